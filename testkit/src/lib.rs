//! Guests, fault injection and capability skips for testing code that uses [`cvm_memory`].
