"""Part of decoder.pyx: the rows of an embedding."""


def embed(weight, const int32_t[::1] tokens, float[:, ::1] out) -> bool:
    """Rows of a matrix (see Decoder) as f32 into out [T, cols]; False, and nothing done, where its format is none
    of F32, F16, BF16 and Q8_0. tokens must be rows of it."""
    cdef const uint8_t[:, ::1] data = weight.data
    cdef int fmt = weight.format, found
    cdef long cols = weight.cols
    if out.shape[0] != tokens.shape[0] or out.shape[1] != cols:
        raise ValueError(f"{tokens.shape[0]} rows of {cols} floats are wanted")
    with nogil:
        found = mer_embed(fmt, &data[0, 0], cols, &tokens[0], tokens.shape[0], &out[0, 0])
    return found != 0
