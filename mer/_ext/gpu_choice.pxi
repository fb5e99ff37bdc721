"""Part of gpu_decoder.pyx: routers, and layers whose experts are all on the device: nobody waits for those before the step ends."""


cdef int place_choices(GpuDecoder d, VramTier tier) except -1:
    """Before layers are added: from now on they are complete where all of their experts are in the tier."""
    d.tier, d.most_chosen, tier.fills = tier, tier.arithmetic.few, True
    d.chosen_memory = np.zeros((tier.n_layers, d.most_chosen, d.router.top_k), np.int32)
    d.chosen_pointer = d.pin(d.chosen_memory)
    d.chosen = <const int32_t *><uintptr_t>d.chosen_memory.ctypes.data
    d.chosen_layers = <long *>calloc(tier.n_layers, sizeof(long))
    if d.chosen_layers is NULL:
        raise MemoryError
    return 0


cdef void ask_router(GpuDecoder d, const GpuLayer *g, const Launches *router, uint64_t h_host, bint acts) noexcept nogil:
    """h = norm(x), a copy of it for the host, its prepared rows where something takes them; and the router's products."""
    acts = (acts or g.shared_gate.prepared or (g.gate_up.prepared and not g.shared_norm)
            or (router.prepared and not g.router_norm))
    join(d, g.mlp_norm, d.at.h, h_host, d.at.h_acts if acts else 0, g.router_norm, d.at.h2 if g.router_norm else 0,
         d.at.acts if g.router_norm and router.prepared else 0)
    if g.router_norm:
        multiply(d, router, d.at.h2, d.at.acts)
    else:
        multiply(d, router, d.at.h, d.at.h_acts)


cdef void compute_layer(GpuDecoder d, const GpuLayer *g, long index, long moe_index) noexcept nogil:
    """A complete layer's choice, experts and shared expert."""
    cdef uint64_t ids = d.chosen_pointer + moe_index * d.most_chosen * d.router.top_k * sizeof(int32_t)
    ask_router(d, g, &g.choice, 0, d.tier.arithmetic.takes_blocks(moe_index))
    if d.error == 0:
        note(d, d.tier.compute_chosen(moe_index, d.n_tokens, &d.router, g.router_choice_bias, g.router_expert_scale,
                                      d.at.h, d.at.h_acts, ids))
    if g.gate_up.n:
        shared_expert(d, g)
    d.chosen_layers[d.n_chosen] = moe_index
    d.n_chosen += 1
    d.complete_index, d.unwaited = index, True


cdef void owe_experts(GpuDecoder d, const GpuLayer *g, long index) noexcept nogil:
    """x += the routed experts' sum, which the CPU has, or their rows."""
    cdef bint complete = index == d.complete_index
    owe(d, d.tier.arithmetic.chosen_rows if complete else d.mapped(d.y), g.mlp_out_norm, g.layer_scale)
    if complete:
        d.pending.places, d.pending.weights = d.tier.arithmetic.chosen_places, d.tier.arithmetic.chosen_weights
        d.pending.top_k, d.complete_index = <int32_t>d.router.top_k, -1


cdef void note_chosen(GpuDecoder d, int32_t *routes, long stride) noexcept nogil:
    """Who was chosen without the host, told to the tier, and routes [MoE layers, stride] where there are such."""
    cdef long i, pairs = d.n_tokens * d.router.top_k
    cdef const int32_t *ids
    if d.unwaited:
        wait_for_all(d)
    for i in range(d.n_chosen if d.error == 0 else 0):
        ids = d.chosen + d.chosen_layers[i] * d.most_chosen * d.router.top_k
        d.tier.note_chosen(d.chosen_layers[i], ids, d.n_tokens)
        if routes is not NULL:
            memcpy(routes + d.chosen_layers[i] * stride, ids, pairs * sizeof(int32_t))
    d.n_chosen = 0
