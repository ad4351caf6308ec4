//! The save area that a vCPU starts from, which the launch measures last.
//!
//! KVM makes each VMSA itself, from the registers that the VMM has given the vCPU; the digest can be predicted only by
//! making the same page here. [`Vmsa::at_reset`] is the state of a processor after reset as QEMU sets it (and as
//! `sev-snp-measure` and others compute it for QEMU); [`Vmsa::from_page`] takes any other, such as one from an IGVM file.
//! [`registers`](Vmsa::registers) says which registers a VMM must give the vCPU for KVM to make that very page.
//!
//! Mirrors `struct sev_es_save_area` (`arch/x86/include/asm/svm.h`) and `sev_es_sync_vmsa()` (`arch/x86/kvm/svm/sev.c`).

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use crate::page::Page;

/// What the first instruction of a processor after reset is fetched from.
pub const RESET_VECTOR: u32 = 0xffff_fff0;

/// Features in [`VmsaOptions::features`]: SNP is active. KVM adds it by itself.
pub const SNP_ACTIVE: u64 = 1 << 0;
/// Features in [`VmsaOptions::features`]: debug registers are swapped by the hardware.
pub const DEBUG_SWAP: u64 = 1 << 5;

/// Offsets in `struct sev_es_save_area`.
mod at {
    pub const ES: usize = 0x00;
    pub const CS: usize = 0x10;
    pub const SS: usize = 0x20;
    pub const DS: usize = 0x30;
    pub const FS: usize = 0x40;
    pub const GS: usize = 0x50;
    pub const GDTR: usize = 0x60;
    pub const LDTR: usize = 0x70;
    pub const IDTR: usize = 0x80;
    pub const TR: usize = 0x90;
    pub const EFER: usize = 0xd0;
    pub const CR4: usize = 0x148;
    pub const CR3: usize = 0x150;
    pub const CR0: usize = 0x158;
    pub const DR7: usize = 0x160;
    pub const DR6: usize = 0x168;
    pub const RFLAGS: usize = 0x170;
    pub const RIP: usize = 0x178;
    pub const RSP: usize = 0x1d8;
    pub const RAX: usize = 0x1f8;
    pub const CR2: usize = 0x240;
    pub const G_PAT: usize = 0x268;
    pub const RCX: usize = 0x308;
    pub const RDX: usize = 0x310;
    pub const RBX: usize = 0x318;
    pub const RBP: usize = 0x328;
    pub const RSI: usize = 0x330;
    pub const RDI: usize = 0x338;
    pub const R8: usize = 0x340;
    pub const SEV_FEATURES: usize = 0x3b0;
    pub const XCR0: usize = 0x3e8;
    pub const MXCSR: usize = 0x408;
    pub const FTW: usize = 0x40c;
    pub const FSW: usize = 0x40e;
    pub const FCW: usize = 0x410;
}

/// `EFER.SVME`, which KVM sets in every guest's save area.
const EFER_SVME: u64 = 1 << 12;
/// `CR4.MCE`, which in every guest's save area is as the host's.
const CR4_MCE: u64 = 1 << 6;
/// The bit of RFLAGS that is always one.
const RFLAGS_FIXED: u64 = 1 << 1;
/// `MSR_IA32_CR_PAT` after reset.
const PAT: u64 = 0x0007_0406_0007_0406;

/// The models of processor that QEMU names, as far as the digest knows them: by what CPUID leaf 1 gives in EAX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CpuSignature(pub u32);

impl CpuSignature {
    /// Of a family, model and stepping (AMD's CPUID specification, Fn0000_0001_EAX).
    ///
    /// ```
    /// use cvm_memory_sev::vmsa::CpuSignature;
    ///
    /// assert_eq!(CpuSignature::new(23, 1, 2), CpuSignature(0x0080_0f12));
    /// ```
    pub const fn new(family: u8, model: u8, stepping: u8) -> Self {
        let (base, extended) = if family > 0xf { (0xf, family.wrapping_sub(0xf)) } else { (family, 0) };
        let (model_low, model_high) = (model & 0xf, model >> 4);
        Self(
            (extended as u32) << 20
                | (model_high as u32) << 16
                | (base as u32) << 8
                | (model_low as u32) << 4
                | (stepping & 0xf) as u32,
        )
    }

    /// Of a CPU type as QEMU's `-cpu` names it, any version: `EPYC-v4`, `EPYC-Milan`, ...
    pub fn of_cpu_type(name: &str) -> Option<Self> {
        let base = match name.rsplit_once("-v") {
            Some((base, version)) if !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit()) => base,
            _ => name,
        };
        CPU_TYPES.iter().find(|(known, _)| *known == base).map(|(_, signature)| *signature)
    }

    /// The names that [`of_cpu_type`](Self::of_cpu_type) knows, versions aside.
    pub fn cpu_types() -> impl Iterator<Item = &'static str> {
        CPU_TYPES.iter().map(|(name, _)| *name)
    }
}

const CPU_TYPES: &[(&str, CpuSignature)] = &[
    ("EPYC", CpuSignature::new(23, 1, 2)),
    ("EPYC-IBPB", CpuSignature::new(23, 1, 2)),
    ("EPYC-Rome", CpuSignature::new(23, 49, 0)),
    ("EPYC-Milan", CpuSignature::new(25, 1, 1)),
    ("EPYC-Genoa", CpuSignature::new(25, 17, 0)),
    ("EPYC-Turin", CpuSignature::new(26, 0, 0)),
];

/// What distinguishes one vCPU's state after reset from another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmsaOptions {
    /// Linear address of the first instruction: [`RESET_VECTOR`] for the first vCPU; the others' is in the firmware.
    pub start: u32,
    /// The processor.
    pub cpu: CpuSignature,
    /// `SEV_FEATURES`: what `KVM_SEV_INIT2` was given, and [`SNP_ACTIVE`].
    pub features: u64,
}

/// A save area.
///
/// ```
/// use cvm_memory_sev::digest::LaunchDigest;
/// use cvm_memory_sev::vmsa::{CpuSignature, RESET_VECTOR, SNP_ACTIVE, Vmsa, VmsaOptions};
///
/// let cpu = CpuSignature::of_cpu_type("EPYC-v4").ok_or("unknown processor")?;
/// let first = Vmsa::at_reset(VmsaOptions { start: RESET_VECTOR, cpu, features: SNP_ACTIVE });
/// let mut digest = LaunchDigest::INITIAL;
/// digest.add_vmsa(first.page());
/// assert!(digest.to_string().starts_with("10843246"));
/// # Ok::<(), &str>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmsa {
    page: Page,
}

/// The registers of a vCPU that KVM turns into a given save area.
#[derive(Debug, Clone)]
pub struct Registers {
    /// For `KVM_SET_REGS`.
    pub regs: kvm_regs,
    /// For `KVM_SET_SREGS`. EFER and CR4 without the bits that KVM adds.
    pub sregs: kvm_sregs,
    /// For `KVM_SET_FPU`.
    pub fpu: kvm_fpu,
    /// For `KVM_SET_MSRS`: `MSR_IA32_CR_PAT`, 0x277.
    pub pat: u64,
    /// For `KVM_SET_XCRS`.
    pub xcr0: u64,
}

impl Vmsa {
    /// A processor after reset.
    pub fn at_reset(options: VmsaOptions) -> Self {
        let VmsaOptions { start, cpu, features } = options;
        let mut vmsa = Self { page: Page::ZERO };
        let data = Segment { selector: 0, attributes: 0x93, limit: 0xffff, base: 0 };
        for offset in [at::ES, at::SS, at::DS, at::FS, at::GS] {
            vmsa.put_segment(offset, data);
        }
        let code = Segment { selector: 0xf000, attributes: 0x9b, limit: 0xffff, base: u64::from(start & 0xffff_0000) };
        vmsa.put_segment(at::CS, code);
        let table = Segment { selector: 0, attributes: 0, limit: 0xffff, base: 0 };
        vmsa.put_segment(at::GDTR, table);
        vmsa.put_segment(at::IDTR, table);
        vmsa.put_segment(at::LDTR, Segment { attributes: 0x82, ..table });
        vmsa.put_segment(at::TR, Segment { attributes: 0x8b, ..table });
        vmsa.put(at::EFER, EFER_SVME);
        vmsa.put(at::CR4, CR4_MCE);
        vmsa.put(at::CR0, 0x10);
        vmsa.put(at::DR7, 0x400);
        vmsa.put(at::DR6, 0xffff_0ff0);
        vmsa.put(at::RFLAGS, RFLAGS_FIXED);
        vmsa.put(at::RIP, u64::from(start & 0xffff));
        vmsa.put(at::G_PAT, PAT);
        vmsa.put(at::RDX, u64::from(cpu.0));
        vmsa.put(at::SEV_FEATURES, features);
        vmsa.put(at::XCR0, 1);
        vmsa.page.put(at::MXCSR, &0x1f80_u32.to_le_bytes());
        vmsa.page.put(at::FCW, &0x37f_u16.to_le_bytes());
        vmsa
    }

    /// The save areas of a VM: vCPU 0 at the [`RESET_VECTOR`], the others at `start_of_others`. In the order of the vCPUs.
    pub fn of_all(vcpus: u32, start_of_others: u32, cpu: CpuSignature, features: u64) -> Vec<Self> {
        let start = |vcpu| if vcpu == 0 { RESET_VECTOR } else { start_of_others };
        (0..vcpus).map(|vcpu| Self::at_reset(VmsaOptions { start: start(vcpu), cpu, features })).collect()
    }

    /// A save area as given.
    pub const fn from_page(page: Page) -> Self {
        Self { page }
    }

    /// As KVM makes it on a host with or without machine check exceptions, from the [registers](Self::registers) of this page.
    ///
    /// Some bits are not the VMM's to choose: the guest's `CR4.MCE` is as the host's (set on every ordinary host, clear on a
    /// kernel without `CONFIG_X86_MCE`), `EFER.SVME` and bit 1 of RFLAGS are set. [`at_reset`](Self::at_reset) has them as an
    /// ordinary host does. A page from [elsewhere](Self::from_page) need not: then KVM cannot launch that very page, and the digest
    /// to expect is that of this one.
    #[must_use]
    pub fn on_host(mut self, machine_checks: bool) -> Self {
        let others = self.get(at::CR4) & !CR4_MCE;
        self.put(at::CR4, if machine_checks { others | CR4_MCE } else { others });
        self.put(at::EFER, self.get(at::EFER) | EFER_SVME);
        self.put(at::RFLAGS, self.get(at::RFLAGS) | RFLAGS_FIXED);
        self
    }

    /// The page that is measured.
    pub const fn page(&self) -> &Page {
        &self.page
    }

    /// `SEV_FEATURES`.
    pub fn features(&self) -> u64 {
        self.get(at::SEV_FEATURES)
    }

    /// The same of a vCPU with these features: KVM gives every vCPU those of the VM.
    #[must_use]
    pub(crate) fn with_features(mut self, features: u64) -> Self {
        self.put(at::SEV_FEATURES, features);
        self
    }

    /// What to give the vCPU before the launch is finished, so that KVM makes this page.
    ///
    /// A page may say what KVM would not make: registers that a vCPU does not start with (debug registers, the MSRs of system
    /// calls, a CR2) are not among these.
    pub fn registers(&self) -> Registers {
        let general = |offset: usize| self.get(offset);
        let [r8, r9, r10, r11, r12, r13, r14, r15] =
            [0, 1, 2, 3, 4, 5, 6, 7_usize].map(|nr: usize| self.get(at::R8.saturating_add(nr.saturating_mul(8))));
        let regs = kvm_regs {
            rax: general(at::RAX),
            rbx: general(at::RBX),
            rcx: general(at::RCX),
            rdx: general(at::RDX),
            rsi: general(at::RSI),
            rdi: general(at::RDI),
            rsp: general(at::RSP),
            rbp: general(at::RBP),
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip: general(at::RIP),
            rflags: general(at::RFLAGS),
        };
        let table = |offset| {
            let Segment { base, limit, .. } = self.segment(offset);
            // The limit of a descriptor table has 16 bits.
            kvm_dtable { base, limit: u16::try_from(limit).unwrap_or(u16::MAX), padding: [0; 3] }
        };
        let sregs = kvm_sregs {
            cs: self.segment(at::CS).into(),
            ds: self.segment(at::DS).into(),
            es: self.segment(at::ES).into(),
            fs: self.segment(at::FS).into(),
            gs: self.segment(at::GS).into(),
            ss: self.segment(at::SS).into(),
            tr: self.segment(at::TR).into(),
            ldt: self.segment(at::LDTR).into(),
            gdt: table(at::GDTR),
            idt: table(at::IDTR),
            cr0: self.get(at::CR0),
            cr2: self.get(at::CR2),
            cr3: self.get(at::CR3),
            cr4: self.get(at::CR4) & !CR4_MCE,
            efer: self.get(at::EFER) & !EFER_SVME,
            ..Default::default()
        };
        let fpu = kvm_fpu {
            fcw: u16::from_le_bytes(self.page.get(at::FCW)),
            fsw: u16::from_le_bytes(self.page.get(at::FSW)),
            ftwx: u8::try_from(u16::from_le_bytes(self.page.get(at::FTW))).unwrap_or(u8::MAX),
            mxcsr: u32::from_le_bytes(self.page.get(at::MXCSR)),
            ..Default::default()
        };
        Registers { regs, sregs, fpu, pat: self.get(at::G_PAT), xcr0: self.get(at::XCR0) }
    }

    fn put(&mut self, offset: usize, value: u64) {
        self.page.put(offset, &value.to_le_bytes());
    }

    fn get(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.page.get(offset))
    }

    fn put_segment(&mut self, offset: usize, segment: Segment) {
        let Segment { selector, attributes, limit, base } = segment;
        let mut bytes = [0; 16];
        let fields = selector.to_le_bytes().into_iter().chain(attributes.to_le_bytes());
        let fields = fields.chain(limit.to_le_bytes()).chain(base.to_le_bytes());
        for (to, from) in bytes.iter_mut().zip(fields) {
            *to = from;
        }
        self.page.put(offset, &bytes);
    }

    fn segment(&self, offset: usize) -> Segment {
        Segment {
            selector: u16::from_le_bytes(self.page.get(offset)),
            attributes: u16::from_le_bytes(self.page.get(offset.saturating_add(2))),
            limit: u32::from_le_bytes(self.page.get(offset.saturating_add(4))),
            base: u64::from_le_bytes(self.page.get(offset.saturating_add(8))),
        }
    }
}

/// `struct vmcb_seg`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    selector: u16,
    attributes: u16,
    limit: u32,
    base: u64,
}

impl From<Segment> for kvm_segment {
    /// Attributes as the VMCB packs them: type, S, DPL, P, AVL, L, D/B, G from bit 0.
    fn from(segment: Segment) -> Self {
        let bits = |shift: u32, mask: u16| {
            u8::try_from(segment.attributes.checked_shr(shift).unwrap_or(0) & mask).unwrap_or(0)
        };
        let present = bits(7, 1);
        Self {
            base: segment.base,
            limit: segment.limit,
            selector: segment.selector,
            type_: bits(0, 0xf),
            present,
            dpl: bits(5, 3),
            db: bits(10, 1),
            s: bits(4, 1),
            l: bits(9, 1),
            g: bits(11, 1),
            avl: bits(8, 1),
            unusable: u8::from(present == 0),
            padding: 0,
        }
    }
}
