# What a draft head puts before its layer: a token's embedding and a hidden state become one.

cdef class Join

ctypedef void (*join_task)(Join j, long task, int thread) noexcept nogil


cdef void joined_norms_task(Join j, long t, int thread) noexcept nogil:
    cdef long hidden = j.decoder.hidden
    cdef float eps = j.decoder.eps
    cdef float *y = j.joined + t * 2 * hidden
    mer_rms_norm(j.decoder.x + t * hidden, j.token_norm, y, hidden, eps)
    mer_rms_norm(j.states + t * hidden, j.state_norm, y + hidden, hidden, eps)


cdef void token_norm_task(Join j, long t, int thread) noexcept nogil:
    cdef long hidden = j.decoder.hidden
    mer_rms_norm(j.decoder.x + t * hidden, j.token_norm, j.joined + t * hidden, hidden, j.decoder.eps)


cdef void stream_norms_task(Join j, long t, int thread) noexcept nogil:
    cdef long hidden = j.decoder.hidden, n = j.decoder.streams.n, i
    for i in range(t * n, (t + 1) * n):
        mer_rms_norm(j.states + i * hidden, j.state_norm, j.joined + i * hidden, hidden, j.decoder.eps)


cdef void add_token_task(Join j, long t, int thread) noexcept nogil:
    cdef long hidden = j.decoder.hidden, n = j.decoder.streams.n, i
    for i in range(t * n, (t + 1) * n):
        mer_add(j.decoder.x_streams + i * hidden, j.decoder.y + t * hidden, hidden)


cdef class Join:
    """Belongs to the Decoder of a draft head, between its `begin` and `attend`.

    x = eh_proj [enorm(x); hnorm(state)]; of a decoder with streams, whose states are streams, too, each stream is
    e_proj enorm(x) + h_proj hnorm(stream of the state).

    weights: by these names. buffers: 'joined' and 'join_scratch'.
    """

    cdef Decoder decoder
    cdef list kept                # arrays that the pointers below lead into
    cdef Matrix project           # [hidden, 2 hidden]
    cdef Matrix token_project     # [hidden, hidden], and for the states
    cdef Matrix state_project
    cdef const float *token_norm  # of the embedding
    cdef const float *state_norm
    cdef float *joined            # [tokens, 2 hidden], or [tokens, streams, hidden]
    cdef const float *states      # [tokens, hidden], or [tokens, streams, hidden]
    cdef void *scratch

    def __cinit__(self, Decoder decoder not None, weights, buffers):
        self.decoder, self.kept = decoder, [buffers]
        self.project = decoder.matrix(weights, "eh_proj")
        self.token_project = decoder.matrix(weights, "e_proj")
        self.state_project = decoder.matrix(weights, "h_proj")
        self.token_norm, self.state_norm = decoder.floats(weights["enorm"]), decoder.floats(weights["hnorm"])
        self.joined = <float *>decoder.buffer(buffers, "joined")
        self.scratch = decoder.buffer(buffers, "join_scratch")

    def join(self, const float[:, ::1] states):
        """For the tokens of the batch that the decoder has begun, their embeddings standing in x.

        states: f32 [T, hidden], or [T, streams * hidden].
        """
        cdef Decoder d = self.decoder
        cdef long width = d.hidden * max(<long>1, d.streams.n)
        if states.shape[0] != d.n_tokens or states.shape[1] != width:
            raise ValueError(f"states of {d.n_tokens} tokens are wanted, {width} floats each")
        self.states = &states[0, 0]
        with nogil:
            if d.streams.n == 0:
                self.run(d, joined_norms_task)
                self.linear(d, &self.project, d.n_tokens, d.x)
            else:
                self.run(d, token_norm_task)
                self.linear(d, &self.token_project, d.n_tokens, d.y)
                self.run(d, stream_norms_task)
                self.linear(d, &self.state_project, d.n_tokens * d.streams.n, d.x_streams)
                self.run(d, add_token_task)

    cdef void run(self, Decoder d, join_task task) noexcept nogil:
        d.pool.run(<mer_task_fn>task, <void *>self, d.n_tokens)

    cdef void linear(self, Decoder d, const Matrix *m, long n, float *y) noexcept nogil:
        """y = m joined, of n rows."""
        d.kernels.linear(d.pool, m.format, m.w, m.rows, m.cols, self.joined, n, y, self.scratch)
