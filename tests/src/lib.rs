//! The lab and what the end-to-end tests share.
