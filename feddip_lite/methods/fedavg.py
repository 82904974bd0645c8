"""FedAvg and FedProx: dense training, dense exchange."""

from dataclasses import dataclass, replace

from ..core.settings import real, setting
from ..core.terms import ProximalTerm
from .base import About, LocalPlan, Memory, Message, Method


@dataclass(frozen=True)
class FedAvg(Method):
    """Federated averaging (McMahan et al. 2017): every hook is the default, with nothing pruned."""

    about = About(
        title="FedAvg", family="dense to dense", step="dense", up="dense w", down="dense w",
        source="McMahan et al., AISTATS 2017",
    )  # fmt: skip


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with the proximal term (mu/2) ||w - w_global||^2 in the local loss (Li et al. 2020), textbook form.

    The published FedDIP code's FedProx is inert and not squared (docs/deviations.md D28).
    """

    about = replace(FedAvg.about, title="FedProx", step="dense + proximal term", source="Li et al., MLSys 2020")

    mu: float = setting(0.01, real("[0, inf)"), "strength of the proximal term")

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        plan = super().plan(offer, memory, t)
        return replace(plan, add_gradient_=ProximalTerm(plan.weights, self.mu))
