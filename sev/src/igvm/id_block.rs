//! The ID block of a file, as the firmware wants it: the same fields, at other places.
//!
//! It checks no signature; the firmware does. Mirrors `struct IGVM_VHS_SNP_ID_BLOCK` (the IGVM specification), and the
//! ID block and ID authentication information structures of the SEV-SNP firmware ABI, `SNP_LAUNCH_FINISH`.

use ::igvm::IgvmDirectiveHeader;
use igvm_defs::{IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY, IGVM_VHS_SNP_ID_BLOCK_SIGNATURE};

use super::IgvmError;
use crate::commands::IdBlock;
use crate::page::Page;

/// Offsets in the authentication information. Numbers are little-endian.
mod auth {
    pub const ID_KEY_ALGORITHM: usize = 0x0;
    pub const AUTHOR_KEY_ALGORITHM: usize = 0x4;
    pub const BLOCK_SIGNATURE: usize = 0x40;
    pub const ID_KEY: usize = 0x240;
    pub const ID_KEY_SIGNATURE: usize = 0x680;
    pub const AUTHOR_KEY: usize = 0x880;
}

/// What the directive says, without the policy, which the file has elsewhere.
#[derive(Debug)]
pub(super) struct Vouched {
    /// The digest.
    pub(super) digest: [u8; 48],
    block: [u8; 88],
    auth: Box<Page>,
    author_key: bool,
}

impl Vouched {
    /// The block of `directive`, if that is one.
    pub(super) fn new(directive: &IgvmDirectiveHeader) -> Result<Option<Self>, IgvmError> {
        let IgvmDirectiveHeader::SnpIdBlock {
            author_key_enabled,
            ld,
            family_id,
            image_id,
            version,
            guest_svn,
            id_key_algorithm,
            author_key_algorithm,
            id_key_signature,
            id_public_key,
            author_key_signature,
            author_public_key,
            compatibility_mask: _,
            reserved: _,
        } = directive
        else {
            return Ok(None);
        };
        let author_key = match *author_key_enabled {
            0 => false,
            1 => true,
            _ => return Err(IgvmError::IdBlock { reason: "an author key is enabled or not" }),
        };
        let (mut id, mut author) = (Page::ZERO, Page::ZERO);
        put_signature(&mut id, auth::BLOCK_SIGNATURE, id_key_signature);
        put_key(&mut id, auth::ID_KEY, id_public_key);
        put_signature(&mut author, auth::ID_KEY_SIGNATURE, author_key_signature);
        put_key(&mut author, auth::AUTHOR_KEY, author_public_key);
        author.put(auth::AUTHOR_KEY_ALGORITHM, &author_key_algorithm.to_le_bytes());
        if !author_key && author != Page::ZERO {
            return Err(IgvmError::IdBlock { reason: "an author key that is not enabled" });
        }
        id.put(auth::ID_KEY_ALGORITHM, &id_key_algorithm.to_le_bytes());
        for (to, from) in id.iter_mut().zip(author.iter()) {
            *to |= from;
        }
        let mut block = [0; 88];
        let numbers = [version.to_le_bytes(), guest_svn.to_le_bytes()];
        let fields = ld.iter().chain(family_id).chain(image_id).chain(numbers.iter().flatten());
        block.iter_mut().zip(fields).for_each(|(to, from)| *to = *from);
        Ok(Some(Self { digest: *ld, block, auth: Box::new(id), author_key }))
    }

    /// With the policy that the guest is launched with.
    pub(super) fn with_policy(&self, policy: u64) -> IdBlock {
        let mut block = [0; 96];
        let fields = self.block.into_iter().chain(policy.to_le_bytes());
        block.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        IdBlock { block, auth: self.auth.clone(), author_key: self.author_key }
    }
}

fn put_signature(page: &mut Page, offset: usize, signature: &IGVM_VHS_SNP_ID_BLOCK_SIGNATURE) {
    page.put(offset, &signature.r_comp);
    page.put(offset.saturating_add(0x48), &signature.s_comp);
}

/// In a file there is a reserved field after the curve.
fn put_key(page: &mut Page, offset: usize, key: &IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY) {
    page.put(offset, &key.curve.to_le_bytes());
    page.put(offset.saturating_add(0x4), &key.qx);
    page.put(offset.saturating_add(0x4c), &key.qy);
}
