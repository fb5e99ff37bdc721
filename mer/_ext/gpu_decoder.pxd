"""A decoder whose first layers are on a CUDA device: their weights, their keys and values, their hidden states."""
from libc.stdint cimport int32_t, uint8_t, uint64_t

from mer._ext.decoder cimport Decoder, Layer
from mer._ext.device cimport Device, mer_gpu_product
from mer._ext.vram cimport VramTier

cdef extern from "mer_gpu_decoder.h" nogil:
    enum:
        MER_GPU_JOIN_THREADS
        MER_GPU_QUERIES
    ctypedef struct mer_gpu_join:
        uint64_t x, y, places, weights, shared, shared_gate, y_norm, shared_norm, out_norm, layer_scale
        uint64_t rows, norm, h, h_host, acts, norm2, h2, acts2, act_bytes
        float scale, eps
        int32_t hidden, layer_norm, top_k
    ctypedef struct mer_gpu_heads:
        uint64_t qkv, q, q_norm, k_norm, cosine, sine, blocks, positions, sequence_of, tables, block_bytes, stride
        float eps, limit
        int32_t n_heads, n_kv, dim, pairs, interleaved, qk_norm, qk_norm_last, v_norm, no_v, table_stride, kv
    ctypedef struct mer_gpu_latent:
        uint64_t q, wide, latents, norm, cosine, sine, blocks, positions, sequence_of, tables, block_bytes
        float eps
        int32_t n_heads, nope, rope, rank, pairs, interleaved, table_stride, kv
    ctypedef struct mer_gpu_attention:
        uint64_t q, out, gate, sinks, blocks, positions, sequence_of, tables, spans, scores, shrinks, sums
        uint64_t block_bytes, gate_stride, stride
        float scale
        int32_t n_heads, n_kv, dim, value_dim, window, table_stride, kv, first, end, tiles, heads, latent

cdef enum:
    N_INPUTS = 4                 # of what a recurrent layer's state takes in: mixed, z, decay and beta

# One of those: the host's and the device's array, [tokens, width]
cdef struct Input:
    float *here
    uint64_t there
    long width

# Products with one input: matrices of one format and shape.
cdef struct Launch:
    void *few                    # kernels, for few tokens and for many
    void *many
    long first, n                # of the table of products
    int rows, cols
    long x_stride, y_stride      # floats from one input, or result, to the next
    bint prepared                # it takes activations in int8, not as floats

# Products with one input, of up to four formats.
cdef struct Launches:
    Launch each[4]
    int n
    bint floats, prepared        # what they take

cdef struct GpuLayer:
    Launches qkv, o, gate_up, down, shared_gate
    Launches router, ahead, choice  # the same products, of the layer before for the guess, for the device's choice
    Launches q_latent, latent, wide, unfold  # of latent attention; its qkv are the queries
    Launches inputs[N_INPUTS]    # of a recurrent layer, which has no qkv
    long joint, gate_at          # floats of a token's queries, keys and values; where the gates of the output are
    bint no_v, gated
    uint64_t attention_norm, mlp_norm, q_norm, k_norm, router_norm, attention_out_norm, mlp_out_norm
    uint64_t q_latent_norm, latent_norm, router_choice_bias, router_expert_scale
    uint64_t routed_out_norm, shared_norm, shared_out_norm, layer_scale, sinks
    uint64_t blocks, block_bytes

# Of the device's memory.
cdef struct Places:
    uint64_t x, h, h2, y, shared, shared_gate, gate, up, qkv, q, attended, acts, h_acts
    uint64_t scores, shrinks, sums, logits, rows, products, step
    uint64_t q_latent, q_wide, out_wide, head_rows

cdef class GpuDecoder(Decoder):
    cdef Device device
    cdef readonly long gpu_layers
    cdef readonly size_t taken_bytes, kv_bytes  # of the device's memory: all; of it keys and values
    cdef GpuLayer *gpu
    cdef Places at
    cdef list taken               # device pointers, to be given back
    cdef list table               # of products, while layers are added
    cdef object host_memory       # pinned: of the buffers
    cdef object products_memory   # pinned
    cdef object step_memory       # pinned
    cdef object ahead_memory      # pinned
    cdef list pinned
    cdef uint64_t host_pointer    # the device's, of the buffers
    cdef uint64_t host_address
    cdef uint64_t ahead_pointer
    cdef float *ahead_logits
    cdef mer_gpu_product *products
    cdef long n_products, n_counted, head_product
    cdef uint8_t *step
    cdef uint8_t *rows_staged
    cdef Input inputs[N_INPUTS]
    cdef long score_floats, gpu_blocks, most_tables, most_tokens
    cdef uint64_t gpu_final_norm, gpu_last_norm
    cdef Launches gpu_head
    cdef bint has_head
    cdef VramTier tier            # of experts; None: the device has none, or can't choose
    cdef long most_chosen         # tokens of a step in which it may choose
    cdef object chosen_memory     # pinned: i32 [MoE layers, most_chosen, top_k]
    cdef const int32_t *chosen
    cdef uint64_t chosen_pointer
    cdef long *chosen_layers      # [layers]
    cdef void *routed_event
    cdef void *join_kernel
    cdef void *heads_kernel
    cdef void *latent_kernel
    cdef void *scores_kernel
    cdef void *latent_scores_kernel
    cdef void *weights_kernel
    cdef void *values_kernel
    cdef void *quantise_kernel
    cdef void *activate_kernel

    # the step
    cdef bint here                # x is on the device
    cdef bint unwaited            # nobody has waited since the device chose
    cdef long n_chosen            # of chosen_layers: the MoE layers of this step in which it did
    cdef long complete_index      # the layer under way, if it does; -1
    cdef mer_gpu_join pending     # what is still to be added to it: y is not 0
    cdef int error
    cdef bint looks_ahead
    cdef long ahead_of            # the layer whose router's products for x are in ahead_logits; -1: none
    cdef uint64_t step_positions, step_sequences, step_spans, step_tables
    cdef uint64_t *step_angles    # of each rotary embedding: cosine, sine

    cdef uint64_t take(self, size_t nbytes) except 0
    cdef uint64_t pin(self, array) except 0
    cdef uint64_t mapped(self, const void *host) noexcept nogil
    cdef Launches add_products(self, list parts, long y_stride) except *
    cdef Launches add_heads(self, m, uint64_t place, long heads, uint64_t y, long x_stride, long y_stride) except *
    cdef int check(self, str what) except -1
