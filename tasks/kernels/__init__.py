"""The kernels, one file an area. Every file here is in the catalogue; see `docs/kernels.md` for how to add one."""
