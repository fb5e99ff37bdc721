"""Part of decoder.pyx: hidden states of several streams (hyper-connections), as DeepSeek-V4 has them.

Before each block x is made of the streams; what it gives goes into all of them, which are mixed meanwhile.
"""

cdef extern from "mer_decoder.h" nogil:
    void mer_stream_weights(float *mixes, const float *x, const float *base, const float *scale, const mer_streams *s)
    void mer_collapse(const float *x, const float *pre, long n, long width, float *out)
    void mer_spread(float *x, const float *y, const float *post, const float *comb, long n, long width)


cdef take_streams(Decoder d, spec, weights):
    s = spec.streams
    if s is not None:
        d.streams = mer_streams(s.n, spec.hidden, s.rounds, s.eps, spec.norm_eps, 0)
        d.head_streams = d.matrix(weights, "head_streams")
        d.head_streams_scale = d.floats(weights["head_streams_scale"])


cdef take_layer_streams(Decoder d, Layer *layer, weights):
    layer.attention_streams = d.matrix(weights, "attention_streams")
    layer.attention_streams_scale = d.vector(weights, "attention_streams_scale")
    layer.mlp_streams = d.matrix(weights, "mlp_streams")
    layer.mlp_streams_scale = d.vector(weights, "mlp_streams_scale")


cdef void begin_streams_task(Decoder d, long t, int thread) noexcept nogil:
    cdef long i
    for i in range(d.streams.n):
        memcpy(d.x_streams + (t * d.streams.n + i) * d.hidden, d.x + t * d.hidden, d.hidden * sizeof(float))


cdef void collapse_task(Decoder d, long t, int thread) noexcept nogil:
    cdef const float *x = d.x_streams + t * d.streams.n * d.hidden
    cdef float *mixes = d.mixes + t * d.routing.rows
    mer_stream_weights(mixes, x, d.routing.bias, d.streams_scale, &d.streams)
    mer_collapse(x, mixes, d.streams.n, d.hidden, d.x + t * d.hidden)


cdef void collapse(Decoder d, const Matrix *m, const float *scale) noexcept nogil:
    """x = the streams made one; how a block's output goes into them stands in `mixes` until then."""
    if d.streams.n == 0:
        return
    d.linear(m, d.x_streams, d.n_tokens, d.mixes)
    d.streams.last = m.rows == d.streams.n
    d.routing, d.streams_scale = m, scale
    d.run(collapse_task, d.n_tokens)


cdef inline void spread_block(Decoder d, long t, const float *y) noexcept nogil:
    cdef long n = d.streams.n
    cdef float *mixes = d.mixes + t * (2 + n) * n
    mer_spread(d.x_streams + t * n * d.hidden, y, mixes + n, mixes + 2 * n, n, d.hidden)
