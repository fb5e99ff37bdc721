"""Feed-forward blocks as DeepSeek has them: plain first layers, then experts beside a shared one."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.tensors import Tensors
from mer.model.spec import RouterSpec


def sigmoid_router(config: Config, *, default_scale: float = 1.0) -> RouterSpec:
    """Sigmoid scores; a learnt bias takes part in the choice, which is made in the best groups."""
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    n = config.integer("n_routed_experts", "num_local_experts", "num_experts")
    top_k = config.integer("num_experts_per_tok")
    groups = config.integer("n_group", default=1)
    top_groups = config.integer("topk_group", default=1)
    if n % groups or (groups > 1 and n // groups < 2):
        raise config.wrong(f"{n} experts can't be {groups} groups (n_group) of two or more")
    if top_groups > groups:
        raise config.wrong(f"topk_group is {top_groups}, but n_group is {groups}")
    if top_k > top_groups * (n // groups):
        raise config.wrong(
            f"num_experts_per_tok is {top_k}, more than {top_groups} groups of {n // groups} hold"
        )
    return RouterSpec(
        n_experts=n,
        top_k=top_k,
        score="sigmoid",
        normalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", default=default_scale),
        epsilon=1e-20,
        n_groups=groups,
        top_groups=top_groups,
    )


class Blocks:
    """The feed-forward blocks of a model's layers. Sizes are in elements."""

    def __init__(self, config: Config, router: RouterSpec, *, default_plain: int) -> None:
        """default_plain: layers without experts where first_k_dense_replace is missing."""
        config.expect("moe_layer_freq", 1)
        plain = config.integer("first_k_dense_replace", default=default_plain, minimum=0)
        self.router = router
        self.hidden, self.inter = config.integer("hidden_size"), config.integer("moe_intermediate_size")
        self.dense_inter = config.integer("intermediate_size") if plain else 0
        self.shared_inter = self.inter * config.integer("n_shared_experts", default=1, minimum=0)
        # Of each layer, whether it has experts.
        self.moe = [i >= plain for i in range(config.integer("num_hidden_layers"))]

    def take(self, tensors: Tensors, i: int) -> None:
        """The tensors of layer i's block."""
        block = f"model.layers.{i}.mlp"
        if not self.moe[i]:
            common.take_feed_forward(tensors, i, block, self.hidden, self.dense_inter)
            return
        n = self.router.n_experts
        tensors.take_linear(f"{i}.router", f"{block}.gate", n, self.hidden)
        if self.router.score == "sigmoid":
            tensors.take(f"{i}.router_choice_bias", f"{block}.gate.e_score_correction_bias", n)
        tensors.take_experts(i, common.MLP_EXPERTS, n, self.hidden, self.inter)
        if self.shared_inter:
            common.take_feed_forward(tensors, i, f"{block}.shared_experts", self.hidden, self.shared_inter)
