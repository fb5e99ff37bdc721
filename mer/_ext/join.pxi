# What a draft head puts before its layer: a token's embedding and a hidden state become one.

cdef class Join

ctypedef void (*join_task)(Join j, long task, int thread) noexcept nogil


cdef void joined_norms_task(Join j, long t, int thread) noexcept nogil:
    cdef long hidden = j.decoder.hidden
    cdef float eps = j.decoder.eps
    cdef float *y = j.joined + t * 2 * hidden
    mer_rms_norm(j.decoder.x + t * hidden, j.token_norm, y, hidden, eps)
    mer_rms_norm(j.states + t * hidden, j.state_norm, y + hidden, hidden, eps)


cdef class Join:
    """Belongs to the Decoder of a draft head: between its `begin` and `attend`, x = project [norm(x); norm(state)].

    weights: 'eh_proj' (a matrix), 'enorm' and 'hnorm' (vectors). buffers: 'joined' and 'join_scratch'.
    """

    cdef Decoder decoder
    cdef list kept                # arrays that the pointers below lead into
    cdef Matrix project           # [hidden, 2 hidden]
    cdef const float *token_norm  # of the embedding
    cdef const float *state_norm
    cdef float *joined            # [tokens, 2 hidden]
    cdef const float *states      # [tokens, hidden]
    cdef void *scratch

    def __cinit__(self, Decoder decoder not None, weights, buffers):
        self.decoder, self.kept = decoder, [buffers]
        self.project = decoder.matrix(weights, "eh_proj")
        self.token_norm, self.state_norm = decoder.floats(weights["enorm"]), decoder.floats(weights["hnorm"])
        self.joined = <float *>decoder.buffer(buffers, "joined")
        self.scratch = decoder.buffer(buffers, "join_scratch")

    def join(self, const float[:, ::1] states):
        """x = project [norm(x); norm(states)], for the tokens of the batch that the decoder has begun.

        states: f32 [T, hidden].
        """
        cdef Decoder d = self.decoder
        if states.shape[0] != d.n_tokens or states.shape[1] != d.hidden:
            raise ValueError(f"states of {d.n_tokens} tokens are wanted, {d.hidden} floats each")
        self.states = &states[0, 0]
        with nogil:
            d.pool.run(<mer_task_fn><join_task>joined_norms_task, <void *>self, d.n_tokens)
            d.kernels.linear(d.pool, self.project.format, self.project.w, self.project.rows, self.project.cols,
                             self.joined, d.n_tokens, d.x, self.scratch)
