"""The decoder with its first layers on a CUDA device: what mer._ext.decoder computes, in the same bytes.

Weights, keys and values of those layers are in the device's memory, and so are the hidden states, until a layer of the
CPU or the end of the step wants them. The router's products and what the experts take are written by the kernels into
the host's pinned memory; the CPU waits for them once a layer, chooses, and has the experts computed; their sum is read
from where it stands. Where all of a layer's experts are on the device, and the step has few tokens, nobody waits: it chooses by
itself (`mixture`), and the CPU hears of it when the step is over. What ends one block of a layer is not computed until the next one begins: it is one kernel.
"""
import cython
import numpy as np

from math import gcd

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from mer._ext.decoder cimport Decoder, Geometry, Layer
from mer._ext.device cimport MER_STREAM_COMPUTE, Device, mer_gpu_product

from mer._ext.gpu_mixture import NAMES

cdef extern from "mer_formats.h" nogil:
    enum:
        MER_Q4_0
    size_t mer_act_bytes(int fmt, long cols)

cdef extern from "mer_decoder.h" nogil:
    enum:
        MER_KV_BLOCK

cdef enum:
    THREADS = 128                # MER_GPU_THREADS
    ROWS = 8                     # MER_GPU_ROWS
    MANY_ROWS = 64               # MER_GPU_MANY_ROWS
    MANY_TOKENS = 32             # MER_GPU_MANY_TOKENS
    FEW = 12                     # most tokens for which the kernels for few are quicker
    MOST_BLOCKS = 65535          # of a grid's second and third dimension
    SPAN_TOKENS = 16             # as in decoder.pyx
    MOST_SHARED = 48 << 10       # dynamic shared memory that needs no permission
    PLACE_ALIGN = 256
    STEP_ALIGN = 64

FLOATS = (0, 1, 30)
# The parts of a layer that are matrices; each may have a bias.
MATRICES = ("q", "k", "v", "q_gate", "o", "q_latent", "latent", "k_up", "v_up", "gate", "up", "down", "router",
            "shared_gate", "mix", "z", "a", "b")
VECTORS = ("q_norm", "k_norm", "q_latent_norm", "latent_norm", "attention_out_norm", "mlp_out_norm", "routed_out_norm",
           "shared_norm", "shared_out_norm", "layer_scale", "sinks", "router_choice_bias", "router_expert_scale")
PRODUCT = np.dtype([("weights", "u8"), ("bias", "u8"), ("y", "u8"), ("index", "u8"), ("first", "i4"), ("count", "i4")])


def layer_arrays(spec, weights):
    """What a layer takes to the device, by name: matrices as bytes, vectors as f32."""
    arrays = {}
    for name in MATRICES:
        if name in weights:
            arrays[name] = weights[name].data
            if name + "_bias" in weights:
                arrays[name + "_bias"] = weights[name + "_bias"]
    for name in ("attention_norm", "mlp_norm"):
        if name in weights:
            arrays[name] = [weights[name], *([weights[name + "_bias"]] if name + "_bias" in weights else [])]
    for name in VECTORS:
        if name in weights:
            arrays[name] = weights[name]
    if "router_norm" in weights:
        arrays["router_norm"] = weights["router_norm"] * np.float32(spec.router.norm_scale)
    for name, array in arrays.items():
        if name not in MATRICES:
            arrays[name] = np.ascontiguousarray(np.concatenate(array) if isinstance(array, list) else array, np.float32)
    return arrays


include "gpu_launches.pxi"
include "gpu_latent.pxi"
include "gpu_recurrent.pxi"
include "gpu_choice.pxi"


@cython.no_gc_clear
cdef class GpuDecoder(Decoder):
    """As Decoder; `place` comes before the first `add_layer`."""

    def __dealloc__(self):
        free(self.gpu)
        free(self.step_angles)
        free(self.chosen_layers)
        if self.device is None:
            return
        self.device.enter()
        self.device.finish(MER_STREAM_COMPUTE)
        self.device.drop_event(self.routed_event)
        for array in self.pinned:
            self.device.unpin(<void *><uintptr_t>array.ctypes.data)
        for pointer in self.taken:
            self.device.free(pointer)

    def place(self, Device device not None, long layers, long n_blocks, places, head, buffers, VramTier tier=None):
        """The first `layers` layers, one at the least, are to be on the device.

        n_blocks: of the KV cache. places: of mer.model.device_scratch. head: {'head': matrix, 'head_bias': vector},
        where all layers are there and the head is to be, too, else {}. buffers: the host's. tier: of the routed
        experts, where the device has some. Raises GpuMemoryError, or GpuError.
        """
        cdef uint64_t start
        self.taken, self.pinned, self.table = [], [], []
        self.device = device
        self.gpu_layers, self.gpu_blocks = layers, n_blocks
        self.gpu = <GpuLayer *>calloc(max(layers, 1), sizeof(GpuLayer))
        self.step_angles = <uint64_t *>calloc(2 * max(self.n_ropes, 1), sizeof(uint64_t))
        if self.gpu is NULL or self.step_angles is NULL:
            raise MemoryError
        self.find_kernels()
        start = self.take(sum(-(-n // PLACE_ALIGN) * PLACE_ALIGN for _, n in places.values()))
        at = {name: start + first for name, (first, _) in places.items()}
        self.at = Places(
            at["x"], at["h"], at["h2"], at["y"], at["shared"], at["shared_gate"], at["gate"], at["up"], at["qkv"],
            at["q"], at["attended"], at["acts"], at["h_acts"], at["scores"], at["shrinks"], at["sums"], at["logits"],
            at["rows"], at["products"], at["step"], at["q_latent"], at["q_wide"], at["out_wide"], at["head_rows"])
        self.score_floats = places["scores"][1] // 4
        self.most_tables, self.most_tokens = buffers["last"].shape[0] * n_blocks, buffers["x"].shape[0]
        self.host_memory = buffers["x"].base
        self.host_address = self.host_memory.ctypes.data
        self.host_pointer = self.pin(self.host_memory)
        self.step_memory = np.zeros(places["step"][1] + places["rows"][1], np.uint8)
        self.pin(self.step_memory)
        self.step = <uint8_t *><uintptr_t>self.step_memory.ctypes.data
        self.rows_staged = self.step + <size_t>places["step"][1]
        self.ahead_memory = np.zeros(max(buffers["router_logits"].size, 1), np.float32)
        self.ahead_pointer = self.pin(self.ahead_memory)
        self.ahead_logits = <float *><uintptr_t>self.ahead_memory.ctypes.data
        self.products_memory = np.zeros(places["products"][1] // sizeof(mer_gpu_product), PRODUCT)
        self.pin(self.products_memory)
        self.products = <mer_gpu_product *><uintptr_t>self.products_memory.ctypes.data
        device.check(device.new_event(&self.routed_event), "making an event")
        self.place_head_rows()
        place_inputs(self, buffers)
        self.place_head(head)
        self.ahead_of = self.complete_index = -1
        if tier is not None and tier.arithmetic.can_choose(&self.router):
            place_choices(self, tier)

    def find_kernels(self):
        device = self.device
        self.join_kernel, self.heads_kernel = device.function("mer_join"), device.function("mer_heads")
        self.latent_kernel = device.function("mer_latent")
        self.scores_kernel = device.function("mer_attend_scores")
        self.latent_scores_kernel = device.function("mer_attend_latents")
        self.weights_kernel = device.function("mer_attend_weights")
        self.values_kernel = device.function("mer_attend_values")
        self.quantise_kernel, self.activate_kernel = device.function("mer_quantise"), device.function("mer_activate")
        widest = max(self.hidden, max(getattr(a, "query_rank", None) or 0 for a in self.spec.attentions))
        if widest * sizeof(float) > MOST_SHARED:
            device.allow_shared("mer_join", widest * sizeof(float))

    def place_head_rows(self):
        """Of latent attention, which row of all tokens' heads is a head's of each token: i32 [heads, tokens]."""
        heads = next((a.n_heads for a in self.spec.attentions if hasattr(a, "kv_rank")), 0)
        if heads:
            rows = np.add.outer(np.arange(heads), np.arange(self.most_tokens) * heads).astype(np.int32)
            self.device.upload_py(self.at.head_rows, rows)
            self.device.finish_py()

    def place_head(self, head):
        cdef long floats = self.hidden * (2 if self.layer_norm else 1)
        final = np.empty(floats, np.float32)
        last = np.empty(floats, np.float32)
        memcpy(<void *><uintptr_t>final.ctypes.data, self.final_norm, floats * sizeof(float))
        memcpy(<void *><uintptr_t>last.ctypes.data, self.last_norm, floats * sizeof(float))
        arrays = {"final_norm": final, "last_norm": last}
        if head:
            arrays["head"] = head["head"].data
            if "head_bias" in head:
                arrays["head_bias"] = np.ascontiguousarray(head["head_bias"], np.float32)
        at = self.bring(arrays)
        self.gpu_final_norm, self.gpu_last_norm = at["final_norm"], at["last_norm"]
        if head:
            self.has_head = True
            self.head_product = len(self.table)
            self.gpu_head = self.add_products(
                [(head["head"], at["head"], at.get("head_bias", 0), self.at.logits)], self.vocab)

    def bring(self, arrays):
        """Copy arrays into one new allocation; where each is."""
        cdef uint64_t start
        cdef size_t at = 0
        places = {}
        for name, array in arrays.items():
            places[name] = at
            at += -(-array.nbytes // PLACE_ALIGN) * PLACE_ALIGN
        start = self.take(max(at, 1))
        for name, array in arrays.items():
            self.device.upload_py(start + places[name], array)
        self.device.finish_py()
        return {name: start + place for name, place in places.items()}

    cdef uint64_t take(self, size_t nbytes) except 0:
        pointer = self.device.alloc_py(nbytes)
        self.taken.append(pointer)
        self.taken_bytes += nbytes
        return pointer

    cdef uint64_t pin(self, array) except 0:
        pointer = self.device.pin_py(array)
        self.pinned.append(array)
        return pointer

    cdef uint64_t mapped(self, const void *host) noexcept nogil:
        """The device's pointer to a place in the host's buffers."""
        return self.host_pointer + (<uint64_t><uintptr_t>host - self.host_address)

    cdef Launches add_products(self, list parts, long y_stride) except *:
        """parts: (matrix, place, place of its bias or 0, where its first result goes)."""
        cdef Launches found
        cdef Launch *each
        memset(&found, 0, sizeof(found))
        kinds = {}
        for part in parts:
            kinds.setdefault((part[0].format, part[0].cols), []).append(part)
        for (form, cols), matrices in kinds.items():
            each = &found.each[found.n]
            found.n += 1
            rows = gcd(*(m.data.shape[0] for m, *_ in matrices))
            each.few = self.device.function("mer_rows_" + NAMES[form])
            each.many = self.device.function("mer_many_" + NAMES[form])
            each.first, each.rows, each.cols, each.y_stride = len(self.table), rows, cols, y_stride
            each.x_stride = cols
            each.prepared = form not in FLOATS
            for m, place, bias, y in matrices:
                for first in range(0, m.data.shape[0], rows):
                    self.table.append((place + first * m.data.shape[1], bias + 4 * first if bias else 0, y + 4 * first,
                                       0, 0, 0))
            each.n = len(self.table) - each.first
            if each.prepared:
                found.prepared = True
            else:
                found.floats = True
        if len(self.table) > len(self.products_memory):
            raise ValueError("a layer with more products than were planned")
        return found

    cdef Launches add_heads(self, m, uint64_t place, long heads, uint64_t y, long x_stride, long y_stride) except *:
        """Each head's rows of a matrix, by an input of its own: f32 [tokens, heads], x_stride apart."""
        cdef Launches found
        cdef Launch *each = &found.each[0]
        cdef long rows = m.data.shape[0] // heads, head
        memset(&found, 0, sizeof(found))
        found.n, found.prepared = 1, m.format not in FLOATS
        found.floats = not found.prepared
        each.few = self.device.function("mer_rows_" + NAMES[m.format])
        each.many = self.device.function("mer_many_" + NAMES[m.format])
        each.first, each.n, each.rows, each.cols = len(self.table), heads, rows, m.cols
        each.x_stride, each.y_stride, each.prepared = x_stride, y_stride, found.prepared
        for head in range(heads):
            self.table.append((place + head * rows * m.data.shape[1], 0, y + head * (y_stride // heads) * sizeof(float),
                               self.at.head_rows + head * self.most_tokens * sizeof(int32_t), 0, 0))
        return found

    def add_layer(self, weights, blocks):
        """As Decoder's; blocks of a layer on the device are not used, may be without elements."""
        cdef long index = self.n_layers
        if index >= self.gpu_layers:
            Decoder.add_layer(self, weights, blocks)
            return
        # What the CPU needs of it: the geometry, and the router's vectors.
        vectors = {name: value for name, value in weights.items() if name.removesuffix("_bias") not in MATRICES}
        Decoder.add_layer(self, vectors, blocks)
        self.load_layer(index, weights)

    def load_layer(self, long index, weights):
        cdef GpuLayer *g = &self.gpu[index]
        cdef Geometry *a = &self.layers[index].geometry
        cdef Places *to = &self.at
        at = self.bring(layer_arrays(self.spec, weights))

        def part(name, y):
            return weights[name], at[name], at.get(name + "_bias", 0), y

        if "mix" in weights:
            load_recurrent(self, g, weights, at)
        elif a.latent:
            load_latent(self, g, a, weights, at)
        else:
            self.load_grouped(index, weights, at)
        g.o = self.add_products([part("o", to.y)], self.hidden)
        routed = "router" in weights
        if "gate" in weights:
            inter = weights["gate"].data.shape[0]
            g.gate_up = self.add_products([part("gate", to.gate), part("up", to.up)], inter)
            g.down = self.add_products([part("down", to.shared if routed else to.y)], self.hidden)
        if routed:
            g.router = self.add_products([part("router", self.mapped(self.router_logits))], self.router.n_experts)
            g.ahead = self.add_products([part("router", self.ahead_pointer)], self.router.n_experts)
            if self.tier is not None:
                g.choice = self.add_products([part("router", self.tier.arithmetic.chosen_logits)], self.router.n_experts)
        if "shared_gate" in weights:
            g.shared_gate = self.add_products([part("shared_gate", to.shared_gate)], 1)
        g.attention_norm, g.mlp_norm = at.get("attention_norm", 0), at.get("mlp_norm", 0)
        g.q_norm, g.k_norm, g.router_norm = at.get("q_norm", 0), at.get("k_norm", 0), at.get("router_norm", 0)
        g.attention_out_norm, g.mlp_out_norm = at.get("attention_out_norm", 0), at.get("mlp_out_norm", 0)
        g.routed_out_norm, g.shared_norm = at.get("routed_out_norm", 0), at.get("shared_norm", 0)
        g.shared_out_norm, g.layer_scale = at.get("shared_out_norm", 0), at.get("layer_scale", 0)
        g.sinks, g.router_choice_bias = at.get("sinks", 0), at.get("router_choice_bias", 0)
        g.router_expert_scale = at.get("router_expert_scale", 0)
        if "mix" not in weights:
            g.block_bytes = self.part_bytes(a.latent_dim) if a.latent else 2 * a.n_kv * self.part_bytes(a.head_dim)
            g.blocks = self.take(g.block_bytes * self.gpu_blocks)
            self.kv_bytes += g.block_bytes * self.gpu_blocks
        if self.n_layers == self.gpu_layers:
            self.products_memory[:len(self.table)] = self.table
            self.n_products = len(self.table)

    def load_grouped(self, long index, weights, at):
        cdef GpuLayer *g = &self.gpu[index]
        cdef Geometry *a = &self.layers[index].geometry
        cdef long q = a.n_heads * a.head_dim, kv = a.n_kv * a.head_dim
        g.no_v = "v" not in weights
        g.gate_at = q + kv + (0 if g.no_v else kv)
        g.gated = "q_gate" in weights
        g.joint = g.gate_at + (q if g.gated else 0)
        starts = (("q", 0), ("k", q), ("v", q + kv), ("q_gate", g.gate_at))
        g.qkv = self.add_products(
            [(weights[name], at[name], at.get(name + "_bias", 0), self.at.qkv + 4 * start)
             for name, start in starts if name in weights], g.joint)

    cdef int check(self, str what) except -1:
        cdef int error = self.error
        self.error = 0
        self.device.check(error, what)
        return 0

    def begin(self, const int32_t[::1] positions, const int32_t[::1] query_offsets,
              const int32_t[:, ::1] block_tables, const int32_t[::1] tokens=None):
        Decoder.begin(self, positions, query_offsets, block_tables, tokens)
        if block_tables.shape[0] * block_tables.shape[1] > self.most_tables:
            raise ValueError(f"block tables of {block_tables.shape[0]} x {block_tables.shape[1]}: there is room for "
                             f"{self.most_tables} entries on the device")
        cdef long n_sequences = block_tables.shape[0]
        self.ahead_of, self.here, self.n_chosen = -1, True, 0
        owe(self, 0, 0, 0)
        with nogil:
            self.error = self.device.enter()
            if self.error == 0:
                wait_for_all(self)
                count(self, self.n_tokens)
                stage(self, n_sequences)
        self.check("beginning a step")

    def attend(self, long index):
        if index >= self.gpu_layers:
            self.leave_device()
            Decoder.attend(self, index)
            return
        cdef GpuLayer *g = &self.gpu[index]
        cdef Layer *layer = &self.layers[index]
        with nogil:
            if layer.geometry.latent:
                attend_latents(self, g, layer)
            else:
                join(self, g.attention_norm, self.at.h if g.qkv.floats else 0, 0,
                     self.at.h_acts if g.qkv.prepared else 0, 0, 0, 0)
                multiply(self, &g.qkv, self.at.h, self.at.h_acts)
                heads(self, g, layer)
                attention_of(self, g, layer)
            multiply_attended(self, g)
        self.check(f"attention of layer {index}")

    cdef bint project(self, long index) except -1:
        if index >= self.gpu_layers:
            self.leave_device()
            return False
        with nogil:
            project_inputs(self, &self.gpu[index])
        self.check(f"what the state of layer {index} takes in")
        return True

    cdef int absorb(self, long index) except -1:
        with nogil:
            absorb_attended(self, &self.gpu[index])
        self.check(f"what the state of layer {index} gave")
        return 0

    def feed(self, long index):
        if index >= self.gpu_layers:
            Decoder.feed(self, index)
            return
        cdef GpuLayer *g = &self.gpu[index]
        with nogil:
            join(self, g.mlp_norm, self.at.h if g.gate_up.floats else 0, 0,
                      self.at.h_acts if g.gate_up.prepared else 0, 0, 0, 0)
            feed_forward_of(self, g, self.at.h, self.at.h_acts)
            owe(self, self.at.y, g.mlp_out_norm, g.layer_scale)
        self.check(f"the feed-forward block of layer {index}")

    def route(self, long index):
        if index >= self.gpu_layers:
            Decoder.route(self, index)
            return
        cdef GpuLayer *g = &self.gpu[index]
        # The layer before was asked what the next router will say: this one will be, too.
        cdef bint ahead = self.looks_ahead and index + 1 < self.gpu_layers and self.gpu[index + 1].router.n
        if self.ahead_of >= 0:
            self.looks_ahead = False
        self.ahead_of = -1
        with nogil:
            ask_router(self, g, &g.router, self.mapped(self.h), False)
            if ahead:
                ask_ahead(self, index + 1)
            note(self, self.device.record(self.routed_event, MER_STREAM_COMPUTE))
            if g.gate_up.n:
                shared_expert(self, g)
            note(self, self.device.wait(self.routed_event))
            if self.error == 0:
                self.decide(&self.layers[index], self.router_logits, self.expert_ids, self.expert_weights)
        self.check(f"the router of layer {index}")
        if ahead:
            self.ahead_of = index + 1

    def mixture(self, long index, long moe_index, bint guess):
        if (index >= self.gpu_layers or self.tier is None or self.n_tokens > self.most_chosen
                or not self.tier.complete(moe_index) or (guess and not self.tier.complete(moe_index + 1))):
            return False
        with nogil:
            compute_layer(self, &self.gpu[index], index, moe_index)
        self.check(f"the experts of layer {index}")
        return True

    def note_choices(self, int32_t[:, :, ::1] routes):
        with nogil:
            if self.n_chosen:
                note_chosen(self, NULL if routes is None else &routes[0, 0, 0],
                            0 if routes is None else routes.shape[1] * routes.shape[2])
        self.check("waiting for the end of a step")

    def predict(self, long index):
        self.looks_ahead = True
        if not self.here:
            Decoder.predict(self, index)
            return
        if index >= self.gpu_layers:
            with nogil:
                fetch_x(self)
            self.check("fetching hidden states")
            Decoder.predict(self, index)
            return
        with nogil:
            if self.ahead_of != index:
                ask_ahead(self, index)
                wait_for_all(self)
            if self.error == 0:
                self.decide(&self.layers[index], self.ahead_logits, self.ahead_ids, self.ahead_weights)
        self.ahead_of = -1
        self.check(f"asking the router of layer {index} early")

    def finish(self, long index):
        if index >= self.gpu_layers:
            Decoder.finish(self, index)
            return
        cdef GpuLayer *g = &self.gpu[index]
        owe_experts(self, g, index)
        self.pending.y_norm = g.routed_out_norm
        if g.gate_up.n:
            self.pending.shared, self.pending.shared_norm = self.at.shared, g.shared_out_norm
            self.pending.shared_gate = self.at.shared_gate if g.shared_gate.n else 0

    def hidden_states(self):
        if not self.here:
            return Decoder.hidden_states(self)
        with nogil:
            self.error = self.device.enter()
            if self.error == 0:
                join(self, self.gpu_final_norm, 0, self.mapped(self.h), 0, 0, 0, 0)
                wait_for_all(self)
        self.check("fetching hidden states")
        return self.n_tokens

    def logits(self, const int32_t[::1] rows):
        cdef long n = rows.shape[0]
        if n == 0:
            return
        if not self.has_head or not self.here:
            self.leave_device()
            Decoder.logits(self, rows)
            return
        with nogil:
            settle(self)
            head_logits(self, &rows[0], n)
            if self.error == 0:
                self.cap_logits(n)
        self.check("computing logits")

    def leave_device(self):
        """The hidden states go to the CPU, where the step goes on."""
        if self.here:
            with nogil:
                fetch_x(self)
            self.check("fetching hidden states")
            self.here = False
