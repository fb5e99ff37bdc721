"""Feed-forward blocks as DeepSeek has them: plain first layers, then experts beside a shared one."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.tensors import Tensors
from mer.model.spec import RouterSpec


def sigmoid_router(
    config: Config, *, default_scale: float = 1.0, default_normalise: bool = True
) -> RouterSpec:
    """Sigmoid scores; a learnt bias takes part in the choice, which is made in the best groups."""
    config.expect("scoring_func", "sigmoid", "noaux_tc")  # the latter is what dots.llm1 calls it
    config.expect("topk_method", "noaux_tc")
    n, top_k, groups, top_groups = _sizes(config, least=2)
    return RouterSpec(
        n_experts=n,
        top_k=top_k,
        score="sigmoid",
        normalise=config.flag("norm_topk_prob", default_normalise),
        scale=config.number("routed_scaling_factor", default=default_scale),
        epsilon=1e-20,
        n_groups=groups,
        top_groups=top_groups,
    )


def softmax_router(config: Config) -> RouterSpec:
    """DeepSeek-V2's: softmax scores; the choice is made among all, or in the groups with the best experts."""
    config.expect("scoring_func", "softmax")
    config.expect("topk_method", "greedy", "group_limited_greedy")
    # Published models say false. With true their code leaves the scaling factor out, other code does not.
    config.expect("norm_topk_prob", False)
    n, top_k, groups, top_groups = _sizes(config, least=1)
    if config.get("topk_method") != "group_limited_greedy":
        groups = top_groups = 1
    return RouterSpec(
        n_experts=n,
        top_k=top_k,
        score="softmax",
        normalise=False,
        scale=config.number("routed_scaling_factor", default=1.0),
        n_groups=groups,
        top_groups=top_groups,
        group_best=1,
    )


def _sizes(config: Config, least: int) -> tuple[int, int, int, int]:
    """Experts, how many are chosen, groups (of `least` experts or more), and from how many of them."""
    n = config.integer("n_routed_experts", "num_local_experts", "num_experts")
    top_k = config.integer("num_experts_per_tok")
    groups = config.integer("n_group", default=1)
    top_groups = config.integer("topk_group", default=1)
    if n % groups or (groups > 1 and n // groups < least):
        raise config.wrong(f"{n} experts can't be {groups} groups (n_group) of {least} or more")
    if top_groups > groups:
        raise config.wrong(f"topk_group is {top_groups}, but n_group is {groups}")
    if top_k > top_groups * (n // groups):
        raise config.wrong(
            f"num_experts_per_tok is {top_k}, more than {top_groups} groups of {n // groups} hold"
        )
    return n, top_k, groups, top_groups


def _which_are_moe(config: Config, default_plain: int) -> list[bool]:
    n_layers = config.integer("num_hidden_layers")
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        plain = config.integer("first_k_dense_replace", default=default_plain, minimum=0)
        return [i >= plain for i in range(n_layers)]
    known = ("dense", "sparse")
    if not isinstance(kinds, list) or len(kinds) != n_layers or not all(kind in known for kind in kinds):
        raise config.wrong(f"mlp_layer_types must say dense or sparse for each of the {n_layers} layers")
    return [kind == "sparse" for kind in kinds]


class Blocks:
    """The feed-forward blocks of a model's layers. Sizes are in elements."""

    def __init__(
        self, config: Config, router: RouterSpec, *, default_plain: int, default_shared: int = 1
    ) -> None:
        """default_plain, default_shared: for first_k_dense_replace and n_shared_experts."""
        config.expect("moe_layer_freq", 1)
        self.router = router
        # Of each layer, whether it has experts.
        self.moe = _which_are_moe(config, default_plain)
        self.hidden, self.inter = config.integer("hidden_size"), config.integer("moe_intermediate_size")
        self.dense_inter = 0 if all(self.moe) else config.integer("intermediate_size")
        self.shared_inter = self.inter * config.integer("n_shared_experts", default=default_shared, minimum=0)

    def take(self, tensors: Tensors, i: int, *, choice_bias: str = "e_score_correction_bias") -> None:
        """The tensors of layer i's block."""
        block = f"model.layers.{i}.mlp"
        if not self.moe[i]:
            common.take_feed_forward(tensors, i, block, self.hidden, self.dense_inter)
            return
        n = self.router.n_experts
        tensors.take_linear(f"{i}.router", f"{block}.gate", n, self.hidden)
        if self.router.score == "sigmoid":
            tensors.take(f"{i}.router_choice_bias", f"{block}.gate.{choice_bias}", n)
        tensors.take_experts(i, common.MLP_EXPERTS, n, self.hidden, self.inter)
        if self.shared_inter:
            common.take_feed_forward(tensors, i, f"{block}.shared_experts", self.hidden, self.shared_inter)
