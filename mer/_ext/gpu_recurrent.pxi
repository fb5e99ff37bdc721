"""Part of gpu_decoder.pyx: layers with a state in place of keys and values.

The device has their matrices; the states stay with the CPU, which takes them on (recurrent.pyx) between two trips: what
they take in comes in one copy for each array, what they gave goes back in one.
"""

INPUTS = ("mixed", "z", "decay", "beta")


cdef place_inputs(GpuDecoder d, buffers):
    """What states take in is formed where other layers have queries, keys and values: one array behind the other."""
    cdef uint64_t at = d.at.qkv
    cdef int i
    for i, name in enumerate(INPUTS):
        if name in buffers:
            d.inputs[i] = Input(<float *>d.buffer(buffers, name), at, buffers[name].shape[1])
            at += d.most_tokens * d.inputs[i].width * sizeof(float)


cdef load_recurrent(GpuDecoder d, GpuLayer *g, weights, at):
    """Without the bias of `mix`: recurrent.pyx adds it."""
    cdef int i
    for i, name in enumerate(("mix", "z", "a", "b")):
        if name in weights:
            g.inputs[i] = d.add_products([(weights[name], at[name], 0, d.inputs[i].there)], d.inputs[i].width)


cdef void project_inputs(GpuDecoder d, const GpuLayer *g) noexcept nogil:
    """The host's arrays = the products of norm(x)."""
    cdef bint floats = False, prepared = False
    cdef const Input *each
    cdef int i
    for i in range(N_INPUTS):
        floats = floats or g.inputs[i].floats
        prepared = prepared or g.inputs[i].prepared
    join(d, g.attention_norm, d.at.h if floats else 0, 0, d.at.h_acts if prepared else 0, 0, 0, 0)
    for i in range(N_INPUTS):
        each = &d.inputs[i]
        if g.inputs[i].n:
            multiply(d, &g.inputs[i], d.at.h, d.at.h_acts)
            note(d, d.device.download(MER_STREAM_COMPUTE, each.here, each.there, d.n_tokens * each.width * sizeof(float)))
    wait_for_all(d)


cdef void absorb_attended(GpuDecoder d, const GpuLayer *g) noexcept nogil:
    """x += o(attended), `attended` being the host's, which is not written to before the next wait."""
    cdef long cols = g.o.each[0].cols
    note(d, d.device.upload(MER_STREAM_COMPUTE, d.at.attended, d.attended, d.n_tokens * cols * sizeof(float)))
    multiply_attended(d, g)
