//! Speed of cvm-memory beside its peers: `cargo bench`.
