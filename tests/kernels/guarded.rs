//! Memory that ends where the process may not read or write.

use std::ptr::{NonNull, null_mut};

/// `len` elements, of which the last one lies against a page that is closed.
pub(crate) struct Guarded<T> {
    map: NonNull<libc::c_void>,
    bytes: usize,
    first: NonNull<T>,
    len: usize,
}

const PAGE: usize = 4096;

impl<T: Copy> Guarded<T> {
    pub(crate) fn of(content: &[T]) -> Self {
        let size = size_of_val(content);
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
            let first = map.byte_add(PAGE + inner - size).cast::<T>();
            first.copy_from_nonoverlapping(content.as_ptr(), content.len());
            Self { map: NonNull::new(map).unwrap(), bytes, first: NonNull::new(first).unwrap(), len: content.len() }
        }
    }

    /// The address, or null if there is no element.
    pub(crate) fn address(&self) -> u64 {
        if self.len == 0 { 0 } else { self.first.as_ptr() as u64 }
    }

    pub(crate) fn read(&self) -> Vec<T> {
        // SAFETY: `len` elements from `first` on are ours, and were written.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }.to_vec()
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, with this length.
        unsafe { libc::munmap(self.map.as_ptr(), self.bytes) };
    }
}
