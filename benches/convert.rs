//! What a conversion and a look-up cost on this machine, on the software KVM: absolute times, for whoever changes them.
//!
//! Comparisons with peers, as ratios, are in `page_set`. The software KVM's own work is in these figures; only what a
//! no-op and a look-up cost is the library's alone.

#![allow(missing_docs, reason = "a program")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use cvm_memory::addr::{Gfn, GfnRange};
use cvm_memory::convert::{Request, State};
use cvm_memory::memory::CvmMemory;
use cvm_memory::soft::SoftVm;

fn conversions(criterion: &mut Criterion) {
    let memory = CvmMemory::builder().ram(0, 1 << 30).build(Arc::new(SoftVm::software_protected())).expect("memory");
    let range = |size| GfnRange::from_bytes(0x20_0000, size).expect("a range");
    let convert = |size, to| memory.convert(&Request { range: range(size), to }).expect("admitted").converted();

    criterion.bench_function("no-op, 2 MiB", |bench| bench.iter(|| convert(2 << 20, State::Private)));
    for (name, size) in [("4 KiB", 4096), ("2 MiB", 2 << 20)] {
        let mut to = State::Private;
        criterion.bench_function(&format!("convert, {name}"), |bench| {
            bench.iter(|| {
                to = to.opposite();
                convert(size, to)
            });
        });
        convert(size, State::Private).expect("converted");
    }
    let mut reader = memory.reader();
    let mut gfn = 0;
    criterion.bench_function("look-up", |bench| {
        bench.iter(|| {
            gfn = (gfn + 4099) & 0x3_ffff;
            reader.lookup(black_box(Gfn::new(gfn).expect("a frame")))
        });
    });
}

criterion_group!(benches, conversions);
criterion_main!(benches);
