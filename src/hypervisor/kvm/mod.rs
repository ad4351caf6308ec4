//! The real KVM, through kvm-ioctls.
