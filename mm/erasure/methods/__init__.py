"""Methods of erasure, one file each, behind the protocol of `mm.erasure.methods.protocol`."""
