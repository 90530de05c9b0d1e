//! KVM adapter, boot loader, the machine and its run loop, host I/O. Decides nothing about the protocol.
