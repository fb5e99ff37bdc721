"""Layers that keep a state in place of keys and values: the gated delta rule, the gated short convolution."""
from mer._ext.decoder cimport Decoder, Matrix

cdef extern from "mer_recurrent.h" nogil:
    ctypedef struct mer_conv:
        float *x
        const float *w
        const float *bias
        long stride
        long channels
        long kernel
        int silu
    ctypedef struct mer_delta:
        float *mixed
        float *out
        float *decay
        float *beta
        const float *rate
        const float *bias
        long stride
        long key_heads
        long value_heads
        long key_dim
        long value_dim
        int tiled

cdef struct RecurrentLayer:
    long index                   # of the decoder's layers
    Matrix mix                   # delta rule: to q, k and v; short convolution: to both gates and what they gate
    Matrix z, a, b               # delta rule: to the output's gate, the decay and beta
    const float *conv            # [kernel, channels]
    const float *conv_bias
    const float *rate            # [value_heads]
    const float *dt_bias
    const float *norm            # [value_dim]
    float *states                # [images, state_floats]: the convolution's, then the heads'

cdef class Recurrent

ctypedef void (*recurrent_task)(Recurrent r, long task, int thread) noexcept nogil

cdef class Recurrent:
    cdef Decoder decoder
    cdef list kept                # arrays that the pointers below lead into
    cdef RecurrentLayer *layers
    cdef long n_layers, max_layers

    # the model
    cdef bint short_conv
    cdef long key_heads, value_heads, key_dim, value_dim, kernel, channels
    cdef long conv_floats, head_floats, state_floats
    cdef long stride              # floats of a token in `mixed`
    cdef bint tiled

    # the buffers, see mer/model/scratch.py
    cdef float *mixed
    cdef float *z
    cdef float *decay
    cdef float *beta

    # what the last step's states were made of, f32 [layers, most tokens, replay_floats]; NULL: it is not recorded
    cdef float *inputs
    cdef long most_recorded, input_floats

    # the batch
    cdef object batch_arrays
    cdef const int[:, ::1] moves  # [S, 4] read, written and kept images, and where the last one is kept
    cdef const int[::1] offsets   # [S + 1]
    cdef long n_sequences

    # the layer under way, for the tasks
    cdef RecurrentLayer *layer
    cdef long number
    cdef mer_conv conv
    cdef mer_delta delta
    cdef long conv_tasks, delta_tasks

    cdef void run(self, recurrent_task task, long n) noexcept nogil
    cdef float *image(self, long sequence, long which) noexcept nogil
    # of the layer under way and the batch's tokens: their place in `inputs`, and in the buffers
    cdef void record(self, long n) noexcept nogil
    cdef void restore(self, const int[::1] rows) noexcept nogil
    # mixed -> states, and what comes out of them
    cdef void pass_states(self, long n) noexcept nogil
    # h -> mixed, z, decay and beta
    cdef void project(self, Decoder d) noexcept nogil
    # n tokens of those -> attended
    cdef void mix_delta(self, long n) noexcept nogil
    cdef void mix_conv(self, long n) noexcept nogil
