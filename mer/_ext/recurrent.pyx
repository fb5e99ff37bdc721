"""Layers that keep a state in place of keys and values, on the compute pool.

A `Recurrent` belongs to a Decoder and computes those of its layers that it was told of: `mix` takes the place of the
decoder's `attend`. States are images: of each such layer an array [images, state_floats], owned by Python. In a step
each sequence reads one image and writes another, so that after an error the one that was read is as it was.
"""
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from mer._ext.decoder cimport Decoder
from mer._ext.kernels cimport mer_task_fn

cdef extern from "mer_recurrent.h" nogil:
    enum: MER_DELTA_COLUMNS
    size_t mer_delta_state(long key_dim, long value_dim)
    void mer_convolve(const mer_conv *c, long t0, long t1, long c0, long c1, const float *before, float *after,
                      float *kept, long kept_at)
    void mer_multiply(float *x, const float *y, long n)
    void mer_product(float *x, const float *y, const float *z, long n)
    void mer_delta_prepare(const mer_delta *d, long t)
    void mer_delta_rule(const mer_delta *d, long t0, long t1, long head, long column, const float *before,
                        float *after, float *kept, long kept_at)
    void mer_gated_rms_norm(const float *x, const float *w, const float *gate, float *y, long n, float eps)

cdef enum:
    # Channels of a convolution that one task takes through a sequence's tokens.
    CHANNELS = 512
    READ = 0
    WRITTEN = 1
    KEPT = 2
    KEPT_AT = 3


def state_floats(spec):
    """Floats of one layer's state of one sequence. spec: mer.model.spec.DeltaSpec or ShortConvSpec."""
    conv = (spec.kernel - 1) * spec.channels
    if hasattr(spec, "value_heads"):
        return conv + spec.value_heads * mer_delta_state(spec.key_dim, spec.value_dim)
    return conv


def replay_floats(spec):
    """Floats of what one layer's state takes in of a token. spec: as of state_floats."""
    return spec.channels + (2 * spec.value_heads if hasattr(spec, "value_heads") else 0)


cdef void conv_task(Recurrent r, long task, int thread) noexcept nogil:
    cdef long s = task // r.conv_tasks, first = task % r.conv_tasks * CHANNELS
    mer_convolve(&r.conv, r.offsets[s], r.offsets[s + 1], first, min(first + CHANNELS, r.channels),
                 r.image(s, READ), r.image(s, WRITTEN), r.image(s, KEPT), r.moves[s, KEPT_AT])


cdef void prepare_task(Recurrent r, long t, int thread) noexcept nogil:
    mer_delta_prepare(&r.delta, t)


cdef void delta_task(Recurrent r, long task, int thread) noexcept nogil:
    """Some columns of one head, through all tokens of one sequence."""
    cdef long columns = (r.value_dim + MER_DELTA_COLUMNS - 1) // MER_DELTA_COLUMNS
    cdef long s = task // r.delta_tasks, head = task % r.delta_tasks // columns, column = task % columns
    cdef long at = r.conv_floats + head * r.head_floats
    cdef float *before = r.image(s, READ)
    cdef float *kept = r.image(s, KEPT)
    mer_delta_rule(&r.delta, r.offsets[s], r.offsets[s + 1], head, column * MER_DELTA_COLUMNS,
                   NULL if before is NULL else before + at, r.image(s, WRITTEN) + at,
                   NULL if kept is NULL else kept + at, r.moves[s, KEPT_AT])


cdef void delta_norm_task(Recurrent r, long t, int thread) noexcept nogil:
    cdef long head, at
    for head in range(r.value_heads):
        at = (t * r.value_heads + head) * r.value_dim
        mer_gated_rms_norm(r.decoder.attended + at, r.layer.norm, r.z + at, r.decoder.attended + at, r.value_dim,
                           r.decoder.eps)


cdef void gate_in_task(Recurrent r, long t, int thread) noexcept nogil:
    """Before the short convolution: of its input's three parts the first gates the last, the second the result."""
    cdef float *x = r.mixed + t * r.stride
    cdef long i
    if r.layer.mix.bias is not NULL:
        for i in range(r.stride):
            x[i] += r.layer.mix.bias[i]
    mer_multiply(x, x + 2 * r.channels, r.channels)


cdef void gate_out_task(Recurrent r, long t, int thread) noexcept nogil:
    cdef const float *x = r.mixed + t * r.stride
    mer_product(r.decoder.attended + t * r.channels, x + r.channels, x, r.channels)


cdef class Recurrent:
    """Those layers of `decoder` that keep a state, all of the kind that spec.recurrent (mer.model.spec) says.

    buffers: of mer.model.scratch, the same as the decoder's.
    """

    def __cinit__(self, Decoder decoder not None, spec, buffers):
        self.decoder, self.kept = decoder, [buffers]
        self.max_layers = len(spec.layers)
        self.layers = <RecurrentLayer *>calloc(self.max_layers, sizeof(RecurrentLayer))
        if self.layers is NULL:
            raise MemoryError
        kind = spec.recurrent
        self.kernel, self.channels = kind.kernel, kind.channels
        self.conv_floats, self.state_floats = (kind.kernel - 1) * kind.channels, state_floats(kind)
        self.short_conv = not hasattr(kind, "value_heads")
        if not self.short_conv:
            self.key_heads, self.value_heads, self.tiled = kind.key_heads, kind.value_heads, kind.tiled
            self.key_dim, self.value_dim = kind.key_dim, kind.value_dim
            self.head_floats = mer_delta_state(kind.key_dim, kind.value_dim)
            self.delta_tasks = kind.value_heads * (-(-kind.value_dim // MER_DELTA_COLUMNS))
        self.stride = 3 * kind.channels if self.short_conv else kind.channels
        self.input_floats = replay_floats(kind)
        self.conv_tasks = -(-kind.channels // CHANNELS)
        self.mixed = <float *>decoder.buffer(buffers, "mixed")
        self.z = <float *>decoder.buffer(buffers, "z")
        self.decay = <float *>decoder.buffer(buffers, "decay")
        self.beta = <float *>decoder.buffer(buffers, "beta")

    def __dealloc__(self):
        free(self.layers)

    def add_layer(self, long index, weights, states):
        """Layer `index` of the decoder's. weights: by part, see mer.model.dense. states: f32 [images, state_floats]."""
        cdef RecurrentLayer *layer = &self.layers[self.n_layers]
        cdef Decoder d = self.decoder
        if self.n_layers == self.max_layers:
            raise ValueError(f"the model has {self.max_layers} layers")
        if states.shape[1] != self.state_floats:
            raise ValueError(f"a state has {self.state_floats} floats, not {states.shape[1]}")
        self.kept.append(states)
        layer.index, layer.states = index, <float *><uintptr_t>states.ctypes.data
        layer.mix, layer.z = d.matrix(weights, "mix"), d.matrix(weights, "z")
        layer.mix.bias = d.vector(weights, "mix_bias")  # added here, also where the matrix is elsewhere
        layer.a, layer.b = d.matrix(weights, "a"), d.matrix(weights, "b")
        layer.conv, layer.conv_bias = d.floats(weights["conv"].T), d.vector(weights, "conv_bias")
        layer.rate, layer.dt_bias = d.vector(weights, "decay_rate"), d.vector(weights, "dt_bias")
        layer.norm = d.vector(weights, "state_norm")
        self.n_layers += 1

    def keep_inputs(self, float[:, :, ::1] inputs):
        """Have `replay` be possible after steps of few tokens. inputs: f32 [layers, most tokens, replay_floats]."""
        if inputs.shape[0] != self.n_layers or inputs.shape[2] != self.input_floats:
            raise ValueError(f"inputs must be [{self.n_layers}, tokens, {self.input_floats}]")
        self.kept.append(inputs)
        self.inputs, self.most_recorded = &inputs[0, 0, 0], inputs.shape[1]

    cdef void run(self, recurrent_task task, long n) noexcept nogil:
        self.decoder.pool.run(<mer_task_fn>task, <void *>self, n)

    cdef float *image(self, long sequence, long which) noexcept nogil:
        """The image of the layer under way that a sequence reads, writes or keeps; NULL: none."""
        cdef long number = self.moves[sequence, which]
        return NULL if number < 0 else self.layer.states + number * self.state_floats

    def begin(self, const int[::1] query_offsets, const int[:, ::1] moves):
        """Take up the batch that the decoder has begun (see mer.model.batch)."""
        self.offsets, self.moves, self.n_sequences = query_offsets, moves, moves.shape[0]

    def mix(self, long number):
        """x += what the layer makes of norm(x) and its states. number: among the layers of this kind."""
        cdef Decoder d = self.decoder
        self.layer, self.number = &self.layers[number], number
        cdef bint elsewhere = d.project(self.layer.index)
        with nogil:
            if not elsewhere:
                d.enter(self.layer.index)
                self.project(d)
            if self.short_conv:
                self.mix_conv(d.n_tokens)
            else:
                self.mix_delta(d.n_tokens)
            if not elsewhere:
                d.leave()
        if elsewhere:
            d.absorb(self.layer.index)

    def replay(self, const int[::1] rows, const int[::1] offsets, const int[:, ::1] moves):
        """Make states anew behind some tokens of the last step, for `keep_inputs` had few enough.

        rows [T]: those tokens, of each sequence the first ones; offsets [S + 1], moves [S, 4]: as in mer.model.batch.
        Bit by bit what a step of those tokens alone would have left.
        """
        if self.inputs is NULL or rows.shape[0] > self.most_recorded:
            raise ValueError("nothing is recorded of so many tokens")
        self.offsets, self.moves, self.n_sequences = offsets, moves, moves.shape[0]
        with nogil:
            for self.number in range(self.n_layers):
                self.layer = &self.layers[self.number]
                self.restore(rows)
                self.pass_states(rows.shape[0])

    cdef void record(self, long n) noexcept nogil:
        cdef long t, heads = self.value_heads
        cdef float *to
        if self.inputs is NULL or n > self.most_recorded:
            return
        for t in range(n):
            to = self.inputs + (self.number * self.most_recorded + t) * self.input_floats
            memcpy(to, self.mixed + t * self.stride, self.channels * sizeof(float))
            memcpy(to + self.channels, self.decay + t * heads, heads * sizeof(float))
            memcpy(to + self.channels + heads, self.beta + t * heads, heads * sizeof(float))

    cdef void restore(self, const int[::1] rows) noexcept nogil:
        cdef long t, heads = self.value_heads
        cdef const float *source
        for t in range(rows.shape[0]):
            source = self.inputs + (self.number * self.most_recorded + rows[t]) * self.input_floats
            memcpy(self.mixed + t * self.stride, source, self.channels * sizeof(float))
            memcpy(self.decay + t * heads, source + self.channels, heads * sizeof(float))
            memcpy(self.beta + t * heads, source + self.channels + heads, heads * sizeof(float))

    cdef void pass_states(self, long n) noexcept nogil:
        cdef RecurrentLayer *layer = self.layer
        self.conv = mer_conv(self.mixed, layer.conv, layer.conv_bias, self.stride, self.channels, self.kernel,
                             not self.short_conv)
        self.run(conv_task, self.n_sequences * self.conv_tasks)
        if self.short_conv:
            return
        self.delta = mer_delta(self.mixed, self.decoder.attended, self.decay, self.beta, layer.rate, layer.dt_bias,
                               self.stride, self.key_heads, self.value_heads, self.key_dim, self.value_dim,
                               self.tiled)
        self.run(prepare_task, n)
        self.run(delta_task, self.n_sequences * self.delta_tasks)

    cdef void project(self, Decoder d) noexcept nogil:
        cdef RecurrentLayer *layer = self.layer
        d.linear(&layer.mix, d.h, d.n_tokens, self.mixed)
        if self.short_conv:
            return
        d.linear(&layer.z, d.h, d.n_tokens, self.z)
        d.linear(&layer.a, d.h, d.n_tokens, self.decay)
        d.linear(&layer.b, d.h, d.n_tokens, self.beta)

    cdef void mix_delta(self, long n) noexcept nogil:
        self.record(n)
        self.pass_states(n)
        self.run(delta_norm_task, n)

    cdef void mix_conv(self, long n) noexcept nogil:
        self.run(gate_in_task, n)
        self.record(n)
        self.pass_states(n)
        self.run(gate_out_task, n)
