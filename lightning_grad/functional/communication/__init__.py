"""Messages between ranks: sparse, low-rank, in signs, in bytes, what each layer sends, and the cost on the wire."""

from lightning_grad.functional.communication.error_feedback import accumulate_residual_, remove_sent_
from lightning_grad.functional.communication.int8_messages import int8_bytes, pack_int8, unpack_int8
from lightning_grad.functional.communication.lgreco import (
    choose_levels,
    feedback_errors,
    low_rank_errors,
    sparse_errors,
)
from lightning_grad.functional.communication.onebit_adam import frozen_adam_, gradient_of_momentum
from lightning_grad.functional.communication.outer_step import outer_step_
from lightning_grad.functional.communication.powersgd import initial_factor, orthonormalize
from lightning_grad.functional.communication.sign_messages import pack_signs, sign_bytes, split_parts, unpack_signs
from lightning_grad.functional.communication.sparse_messages import add_pairs_, pack_pairs, unpack_pairs
from lightning_grad.functional.communication.topk_selection import SELECTORS, select_largest
from lightning_grad.functional.communication.wire import all_gather_bytes, all_reduce_bytes, sparse_wire_gain

__all__ = [
    "SELECTORS",
    "accumulate_residual_",
    "add_pairs_",
    "all_gather_bytes",
    "all_reduce_bytes",
    "choose_levels",
    "feedback_errors",
    "frozen_adam_",
    "gradient_of_momentum",
    "initial_factor",
    "int8_bytes",
    "low_rank_errors",
    "orthonormalize",
    "outer_step_",
    "pack_int8",
    "pack_pairs",
    "pack_signs",
    "remove_sent_",
    "select_largest",
    "sign_bytes",
    "sparse_errors",
    "sparse_wire_gain",
    "split_parts",
    "unpack_int8",
    "unpack_pairs",
    "unpack_signs",
]
