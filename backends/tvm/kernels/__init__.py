"""CPU kernels in TIR, one file per kind; every maker returns a PrimFunc with the raw C interface of `llmc.runtime`."""
