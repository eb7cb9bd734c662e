"""fastrlhf_kernels: the numerical core of RLHF, one function an op.

Every op computes in fp32 (fp64 for fp64 input), takes `backend=` (ref, cpu, triton, cuda), works
under torch.compile(fullgraph=True) and gives the same bits run after run. An op's module opens with
its mathematics; `<op>_ref` in it is the specification in plain PyTorch.
"""

from ._backends import BackendUnavailable, available_backends, use_backend
from .append_kv import append_kv
from .decode_attention import decode_attention
from .gae import gae
from .gae_varlen import gae_varlen
from .kl_divergence import kl_divergence
from .kl_penalty import kl_penalty
from .linear_cross_entropy import linear_cross_entropy
from .linear_logprobs import linear_logprobs
from .linear_ppo_loss import linear_ppo_loss
from .logprobs_from_logits import logprobs_from_logits
from .policy_loss import policy_loss
from .ranking_loss import ranking_loss
from .rollout_advantages import RolloutAdvantages, rollout_advantages
from .sample import SampleOutput, sample
from .shape_rewards import shape_rewards
from .value_loss import value_loss
from .whiten import whiten

__all__ = [
    "BackendUnavailable",
    "RolloutAdvantages",
    "SampleOutput",
    "append_kv",
    "available_backends",
    "decode_attention",
    "gae",
    "gae_varlen",
    "kl_divergence",
    "kl_penalty",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_ppo_loss",
    "logprobs_from_logits",
    "policy_loss",
    "ranking_loss",
    "rollout_advantages",
    "sample",
    "shape_rewards",
    "use_backend",
    "value_loss",
    "whiten",
]
