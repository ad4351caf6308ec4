//! IGVM files: an initial image with its page types, parameters and vCPU contexts, as a list for the launch.
//!
//! The `igvm` crate reads the format; here its directives for SEV-SNP become an [`ImportList`]. KVM measures save
//! areas last, whatever place they have in the file, so that the digest of such a launch is not always the one that the
//! igvm crate computes from the order of the file.
//!
//! Not supported, and refused: pages of 2 MiB, parameters that describe devices (ACPI tables, MMIO ranges, a device tree), relocation.
//!
//! Mirrors the IGVM specification (`igvm_defs`).

mod id_block;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::catch_unwind;

use ::igvm::{IgvmDirectiveHeader, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader, IsolationType};
use cvm_memory::addr::{AddrError, GfnRange};
use igvm_defs::{
    IGVM_VHS_MEMORY_MAP_ENTRY, IGVM_VHS_PARAMETER, IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
    MemoryMapEntryType,
};
use zerocopy::IntoBytes as _;

use self::id_block::Vouched;
use crate::commands::IdBlock;
use crate::cpuid::CpuidTable;
use crate::digest::LaunchDigest;
use crate::import::{Import, ImportList, InvalidImport};
use crate::launch::FinishOptions;
use crate::page::{PAGE_BYTES, Page};
use crate::vmsa::Vmsa;

/// The most that all parameters of a file may occupy. They are for descriptions, not for contents.
const PARAMETER_BYTES: u64 = 16 << 20;

/// Why a file cannot be launched.
#[derive(Debug, thiserror::Error)]
pub enum IgvmError {
    /// The igvm crate cannot read it.
    #[error("not an igvm file: {0}")]
    Format(String),
    /// It is not for SEV-SNP.
    #[error("the file is not for sev-snp")]
    NotForSnp,
    /// Something in it is not supported.
    #[error("{what} at {gpa:#x} is not supported")]
    Unsupported {
        /// What.
        what: &'static str,
        /// Guest physical address, or zero.
        gpa: u64,
    },
    /// A page with more contents than fit.
    #[error("page data of {len:#x} bytes at {gpa:#x}")]
    PageData {
        /// Guest physical address.
        gpa: u64,
        /// Bytes.
        len: usize,
    },
    /// A parameter refers to an area that is not there, was placed already, is too small, or is too large.
    #[error("parameter area {area}: {reason}")]
    Parameter {
        /// Index of the area.
        area: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// Contexts of vCPUs that are not one for each from zero.
    #[error("context of vcpu {vp_index}: {reason}")]
    Context {
        /// Index of the vCPU.
        vp_index: u16,
        /// What is wrong.
        reason: &'static str,
    },
    /// The ID block contradicts itself or the file.
    #[error("id block: {reason}")]
    IdBlock {
        /// What is wrong.
        reason: &'static str,
    },
    /// Memory that the file requires is not whole pages.
    #[error("required memory at {gpa:#x}, {size:#x} bytes")]
    Required {
        /// First byte.
        gpa: u64,
        /// In bytes.
        size: u64,
        /// Why.
        #[source]
        error: AddrError,
    },
    /// A page is not aligned.
    #[error(transparent)]
    Import(#[from] InvalidImport),
}

/// What a file may ask its loader for.
#[derive(Debug, Clone, Default)]
pub struct Parameters<'a> {
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// The VM's memory, ascending.
    pub memory: &'a [GfnRange],
    /// The command line for the guest.
    pub command_line: &'a str,
    /// What the guest is told about its processor.
    pub cpuid: CpuidTable,
    /// Whether memory that is not imported starts as shared.
    pub memory_is_shared: bool,
}

/// A file for SEV-SNP, ready to be launched.
#[derive(Debug, Clone)]
pub struct IgvmImage {
    list: ImportList,
    vmsas: Vec<Vmsa>,
    policy: Option<u64>,
    required: Vec<GfnRange>,
    id_block: Option<(LaunchDigest, IdBlock)>,
}

impl IgvmImage {
    /// Reads `file` and fills in its parameters.
    ///
    /// The igvm crate panics over some malformed files. Where panics unwind that is caught, and is an error like any other (the
    /// process's panic hook is called nevertheless); where they abort, read only files that you trust.
    ///
    /// # Errors
    /// [`IgvmError`].
    pub fn parse(file: &[u8], parameters: &Parameters<'_>) -> Result<Self, IgvmError> {
        // Offsets that point before the data and some contexts of other platforms make the igvm crate panic.
        let read = catch_unwind(|| IgvmFile::new_from_binary(file, Some(IsolationType::Snp)));
        let format = |error: &dyn fmt::Display| IgvmError::Format(error.to_string());
        let file = read.map_err(|_| format(&"its structure contradicts itself"))?.map_err(|error| format(&error))?;
        Self::from_file(&file, parameters)
    }

    /// Takes a file that has been read already.
    ///
    /// # Errors
    /// [`IgvmError`], but for [`IgvmError::Format`].
    pub fn from_file(file: &IgvmFile, parameters: &Parameters<'_>) -> Result<Self, IgvmError> {
        let snp = file.platforms().iter().find_map(|IgvmPlatformHeader::SupportedPlatform(platform)| {
            (platform.platform_type == IgvmPlatformType::SEV_SNP).then_some(platform.compatibility_mask)
        });
        let mask = snp.ok_or(IgvmError::NotForSnp)?;
        let policy = file.initializations().iter().find_map(|header| match header {
            IgvmInitializationHeader::GuestPolicy { policy, compatibility_mask } if compatibility_mask & mask != 0 => {
                Some(*policy)
            }
            _ => None,
        });
        let mut loader = Loader::new(parameters);
        for directive in file.directives() {
            if directive.compatibility_mask().is_none_or(|bits| bits & mask != 0) {
                loader.take(directive)?;
            }
        }
        let id_block = match (loader.vouched, policy) {
            (Some(vouched), Some(policy)) => Some((LaunchDigest::new(vouched.digest), vouched.with_policy(policy))),
            (Some(_), None) => return Err(IgvmError::IdBlock { reason: "the file has no policy to vouch for" }),
            (None, _) => None,
        };
        let vmsas = in_order(loader.contexts)?;
        Ok(Self { list: loader.list, vmsas, policy, required: loader.required, id_block })
    }

    /// What to launch, in the order of the file.
    pub const fn import_list(&self) -> &ImportList {
        &self.list
    }

    /// The save areas, in the order of the vCPUs. The VM must have exactly these.
    pub fn vmsas(&self) -> &[Vmsa] {
        &self.vmsas
    }

    /// The policy that the file was made for.
    pub const fn policy(&self) -> Option<u64> {
        self.policy
    }

    /// Memory that must be there, imported or not.
    pub fn required_memory(&self) -> &[GfnRange] {
        &self.required
    }

    /// The file's ID block, for a guest that is launched with the file's [`policy`](Self::policy).
    pub fn id_block(&self) -> Option<&IdBlock> {
        self.id_block.as_ref().map(|(_, block)| block)
    }

    /// The digest that the file's ID block vouches for.
    pub fn vouched_digest(&self) -> Option<LaunchDigest> {
        self.id_block.as_ref().map(|(digest, _)| *digest)
    }

    /// How to finish the launch: with the file's ID block, if it has one, and the digest that this vouches for. Were that another
    /// than the launch's, the firmware would refuse it, but only after the VM is lost.
    pub fn finish_options(&self) -> FinishOptions {
        FinishOptions {
            expected: self.vouched_digest(),
            id_block: self.id_block().cloned(),
            ..FinishOptions::default()
        }
    }
}

fn in_order(contexts: BTreeMap<u16, Vmsa>) -> Result<Vec<Vmsa>, IgvmError> {
    let numbered = (0..).zip(contexts);
    let vmsa = |(expected, (vp_index, vmsa)): (u16, _)| match vp_index == expected {
        true => Ok(vmsa),
        false => Err(IgvmError::Context { vp_index, reason: "those before it have none" }),
    };
    numbered.map(vmsa).collect()
}

/// What has been gathered from the directives so far.
struct Loader<'a> {
    parameters: &'a Parameters<'a>,
    list: ImportList,
    areas: BTreeMap<u32, Vec<u8>>,
    contexts: BTreeMap<u16, Vmsa>,
    required: Vec<GfnRange>,
    vouched: Option<Vouched>,
}

impl<'a> Loader<'a> {
    const fn new(parameters: &'a Parameters<'a>) -> Self {
        Self {
            parameters,
            list: ImportList::new(),
            areas: BTreeMap::new(),
            contexts: BTreeMap::new(),
            required: Vec::new(),
            vouched: None,
        }
    }

    fn take(&mut self, directive: &IgvmDirectiveHeader) -> Result<(), IgvmError> {
        use IgvmDirectiveHeader as D;
        let unsupported = |what| Err(IgvmError::Unsupported { what, gpa: 0 });
        match directive {
            D::PageData { gpa, flags, data_type, data, .. } => self.page(*gpa, *flags, *data_type, data),
            D::ParameterArea { number_of_bytes, parameter_area_index, initial_data } => {
                self.area(*parameter_area_index, *number_of_bytes, initial_data)
            }
            D::VpCount(at) => self.fill(at, &self.parameters.vcpus.to_le_bytes()),
            D::EnvironmentInfo(at) => self.fill(at, &u32::from(self.parameters.memory_is_shared).to_le_bytes()),
            D::MemoryMap(at) => self.fill(at, &memory_map(self.parameters.memory)),
            D::CommandLine(at) => self.fill(at, &[self.parameters.command_line.as_bytes(), &[0]].concat()),
            D::ParameterInsert(insert) => self.insert(insert.gpa, insert.parameter_area_index),
            D::RequiredMemory { gpa, number_of_bytes, .. } => {
                let (gpa, size) = (*gpa, u64::from(*number_of_bytes));
                let range = GfnRange::from_bytes(gpa, size);
                self.required.push(range.map_err(|error| IgvmError::Required { gpa, size, error })?);
                Ok(())
            }
            D::SnpVpContext { vp_index, vmsa, .. } => {
                let vp_index = *vp_index;
                let mut page = Page::ZERO;
                page.put(0, vmsa.as_bytes());
                match self.contexts.insert(vp_index, Vmsa::from_page(page)) {
                    None => Ok(()),
                    Some(_) => Err(IgvmError::Context { vp_index, reason: "twice" }),
                }
            }
            D::SnpIdBlock { .. } => match std::mem::replace(&mut self.vouched, Vouched::new(directive)?) {
                None => Ok(()),
                Some(_) => Err(IgvmError::IdBlock { reason: "twice" }),
            },
            // Contexts for when there is no isolation, measurements of other platforms, and where to report errors.
            D::X64NativeVpContext { .. }
            | D::X64VbsVpContext { .. }
            | D::AArch64VbsVpContext { .. }
            | D::AArch64CcaVpContext { .. }
            | D::VbsMeasurement { .. }
            | D::ErrorRange { .. } => Ok(()),
            D::Srat(_) | D::Madt(_) | D::Slit(_) | D::Pptt(_) => unsupported("an acpi table as parameter"),
            D::MmioRanges(_) => unsupported("mmio ranges as parameter"),
            D::DeviceTree(_) => unsupported("a device tree as parameter"),
        }
    }

    fn page(
        &mut self,
        gpa: u64,
        flags: IgvmPageDataFlags,
        data_type: IgvmPageDataType,
        data: &[u8],
    ) -> Result<(), IgvmError> {
        if flags.is_2mb_page() {
            return Err(IgvmError::Unsupported { what: "a page of 2 MiB", gpa });
        }
        if data.len() > PAGE_BYTES {
            return Err(IgvmError::PageData { gpa, len: data.len() });
        }
        let mut page = Page::ZERO;
        page.put(0, data);
        self.list.push(match data_type {
            _ if flags.shared() => Import::shared(gpa, &*page)?,
            IgvmPageDataType::SECRETS => Import::secrets(gpa)?,
            IgvmPageDataType::CPUID_DATA | IgvmPageDataType::CPUID_XF => {
                Import::cpuid(gpa, self.parameters.cpuid.clone())?
            }
            IgvmPageDataType::NORMAL if flags.unmeasured() => Import::unmeasured(gpa, &*page)?,
            IgvmPageDataType::NORMAL => Import::normal(gpa, &*page)?,
            _ => return Err(IgvmError::Unsupported { what: "page data of this type", gpa }),
        });
        Ok(())
    }

    fn area(&mut self, area: u32, bytes: u64, initial: &[u8]) -> Result<(), IgvmError> {
        let error = |reason| IgvmError::Parameter { area, reason };
        let used = self
            .areas
            .values()
            .fold(0_u64, |sum, area| sum.saturating_add(u64::try_from(area.len()).unwrap_or(u64::MAX)));
        let size = usize::try_from(bytes).ok().filter(|_| used.saturating_add(bytes) <= PARAMETER_BYTES);
        let size = size.ok_or_else(|| error("too large"))?;
        let mut contents = initial.to_vec();
        if contents.len() > size {
            return Err(error("smaller than its contents"));
        }
        contents.resize(size, 0);
        match self.areas.insert(area, contents) {
            None => Ok(()),
            Some(_) => Err(error("twice")),
        }
    }

    fn fill(&mut self, at: &IGVM_VHS_PARAMETER, value: &[u8]) -> Result<(), IgvmError> {
        let area = at.parameter_area_index;
        let error = |reason| IgvmError::Parameter { area, reason };
        let contents = self.areas.get_mut(&area).ok_or_else(|| error("not there"))?;
        let offset = usize::try_from(at.byte_offset).map_err(|_| error("too small"))?;
        let place = contents.get_mut(offset..).and_then(|rest| rest.get_mut(..value.len()));
        place.ok_or_else(|| error("too small"))?.copy_from_slice(value);
        Ok(())
    }

    /// Places an area, after which it is gone.
    fn insert(&mut self, gpa: u64, area: u32) -> Result<(), IgvmError> {
        let contents = self.areas.remove(&area).ok_or(IgvmError::Parameter { area, reason: "not there" })?;
        self.list.push(Import::unmeasured(gpa, &contents)?);
        Ok(())
    }
}

/// Entries for all memory, then an empty one.
fn memory_map(memory: &[GfnRange]) -> Vec<u8> {
    let entry = |range: &GfnRange| IGVM_VHS_MEMORY_MAP_ENTRY {
        starting_gpa_page_number: range.start().get(),
        number_of_pages: range.pages(),
        entry_type: MemoryMapEntryType::MEMORY,
        flags: 0,
        reserved: 0,
    };
    let last = GfnRange::empty_at(cvm_memory::addr::Gfn::ZERO);
    memory.iter().chain([&last]).flat_map(|range| entry(range).as_bytes().to_vec()).collect()
}
