//! Any file as a firmware image: refused, or sound enough to build a TD from.
//!
//! ```text
//! cd tdx && mkdir -p fuzz/corpus/tdvf
//! cargo +nightly fuzz run tdvf fuzz/corpus/tdvf fuzz/seeds/tdvf -- -max_total_time=60
//! ```
#![no_main]

use cvm_memory_tdx::hob::{memory_list, td_hob};
use cvm_memory_tdx::import::ImportList;
use cvm_memory_tdx::tdvf::Tdvf;
use cvm_memory_tdx::width::Width;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|image: &[u8]| {
    let Ok(tdvf) = Tdvf::parse(image) else { return };
    for section in tdvf.sections() {
        assert!(image.get(section.data.clone()).is_some());
        assert!(section.data.len() as u64 <= section.gfns.bytes());
    }
    let imports = tdvf.imports(&[]).expect("an empty list fits everywhere");
    // Far-away memory is refused here; nothing else can be wrong with sections that were taken.
    if let Ok(list) = ImportList::new(imports, Width::Bits52) {
        assert!(list.bytes() <= 1 << 32);
    }
    let added = tdvf.added_memory();
    if let Ok(memory) = memory_list(&added, &added) {
        assert!(memory.iter().all(|entry| !entry.unaccepted));
        if let Some(section) = tdvf.td_hob() {
            let _may_be_too_long = td_hob(section.gfns.start().into(), &memory).map(|hob| tdvf.imports(&hob).is_ok());
        }
    }
});
