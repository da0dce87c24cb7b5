//! Memory that ends where the process may not read or write.

use std::ptr::{NonNull, null_mut};

/// Bytes, of which the last one lies against a page that is closed.
pub(crate) struct Guarded {
    map: NonNull<libc::c_void>,
    bytes: usize,
    first: NonNull<u8>,
    len: usize,
}

const PAGE: usize = 4096;

impl Guarded {
    pub(crate) fn of(content: &[u8]) -> Self {
        let size = content.len();
        let inner = size.next_multiple_of(PAGE).max(PAGE);
        let bytes = inner + 2 * PAGE;
        // SAFETY: fresh memory, whose first and last page are closed before anything points into them.
        unsafe {
            let map = libc::mmap(
                null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(map, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(map, PAGE, libc::PROT_NONE), 0);
            assert_eq!(libc::mprotect(map.byte_add(PAGE + inner), PAGE, libc::PROT_NONE), 0);
            let first = map.byte_add(PAGE + inner - size).cast::<u8>();
            first.copy_from_nonoverlapping(content.as_ptr(), content.len());
            Self { map: NonNull::new(map).unwrap(), bytes, first: NonNull::new(first).unwrap(), len: content.len() }
        }
    }

    /// The address, or 0 if there is no byte.
    pub(crate) fn address(&self) -> u64 {
        if self.len == 0 { 0 } else { self.first.as_ptr() as u64 }
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        // SAFETY: `len` bytes from `first` on are ours, and were written.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }.to_vec()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, with this length.
        unsafe { libc::munmap(self.map.as_ptr(), self.bytes) };
    }
}
