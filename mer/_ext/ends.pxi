"""Part of decoder.pyx: what is done token by token with what attention, and the whole model, gave."""


cdef void gate_task(Decoder d, long t, int thread) noexcept nogil:
    cdef long width = d.attention.n_heads * d.attention.value_dim
    mer_gate(d.attended + t * width, d.q_gate + t * width, width)


cdef void last_task(Decoder d, long i, int thread) noexcept nogil:
    norm_state(d, d.x + d.rows[i] * d.hidden, d.last_norm, d.last + i * d.hidden)


cdef void head_bias_task(Decoder d, long i, int thread) noexcept nogil:
    add_bias(&d.head, d.logit_rows + i * d.vocab)


cdef void cap_task(Decoder d, long chunk, int thread) noexcept nogil:
    cdef long chunks = (d.vocab + CAP_CHUNK - 1) // CAP_CHUNK, first = chunk % chunks * CAP_CHUNK
    mer_soft_cap(d.logit_rows + chunk // chunks * d.vocab + first, d.logit_cap, min(<long>CAP_CHUNK, d.vocab - first))
