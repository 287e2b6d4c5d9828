"""The solvers of this pack as SAMPLER, for the host's nodes of custom sampling."""

from __future__ import annotations

from comfy_api.latest import io

from ..zigma.solvers import DIFFUSIONS, LAST_STEPS, ODE_SOLVERS, SDE_SOLVERS
from .integrate import FlowSampler, OdeSettings, SdeSettings
from .schema import schema

FOR = "For SamplerCustomAdvanced and SamplerCustom, and for ZigMa Sampler in place of its solver."
NO_LAST_STEP = "none"


class ZigMaODESampler(io.ComfyNode):
    """The probability flow ODE: the same picture for the same noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaODESampler",
            display_name="ZigMa ODE Sampler",
            description="Integrates the flow of a ZigMa model along any falling sigmas. It adds no noise on the way. "
            "euler equals the stock sampler of that name.",
            search_aliases=["euler", "heun", "runge kutta", "dopri5", "adaptive sampler", "flow matching"],
            inputs=[
                io.Combo.Input(
                    "solver", options=list(ODE_SOLVERS), default="euler",
                    tooltip="Model evaluations in each step: euler 1, midpoint and heun 2, heun3 3, rk4 and rk4-3/8 "
                    "4. dopri5 looks at the first and the last of the sigmas alone, and takes 2 evaluations and 6 in "
                    "each step that the tolerances ask for: some 100 in all for the demo model.",
                ),
                io.Float.Input(
                    "rtol", default=1e-3, min=1e-6, max=1.0, step=1e-4, round=False,
                    tooltip="Of dopri5 alone: the relative error allowed in a step. A tenth of it takes two to three "
                    "times as many evaluations.",
                ),
                io.Float.Input(
                    "atol", default=1e-6, min=1e-9, max=1.0, step=1e-6, round=False,
                    tooltip="Of dopri5 alone: the absolute error allowed in a step, added to the relative one.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip=FOR)],
        )  # fmt: skip

    @classmethod
    def execute(cls, solver: str, rtol: float, atol: float) -> io.NodeOutput:
        """Nothing runs yet."""
        return io.NodeOutput(FlowSampler(OdeSettings(solver, rtol, atol)))


class ZigMaSDESampler(io.ComfyNode):
    """An SDE with the same distribution: new noise in every step, which also removes errors of earlier ones."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaSDESampler",
            display_name="ZigMa SDE Sampler",
            description="Integrates the SDE that belongs to the flow of a ZigMa model along any falling sigmas, with "
            "noise from the run's seed in every step. It wants 100 steps or more.",
            search_aliases=["euler maruyama", "stochastic sampler", "ancestral", "langevin", "SiT"],
            inputs=[
                io.Combo.Input(
                    "solver", options=list(SDE_SOLVERS), default="euler-maruyama",
                    tooltip="Model evaluations in each step: euler-maruyama 1, heun 2; the last step adds 1.",
                ),
                io.Combo.Input(
                    "diffusion", options=list(DIFFUSIONS), default="sigma",
                    tooltip="How much noise is added, and taken away again, along the run. sigma fades towards the "
                    "picture; constant does not; increasing-decreasing is strongest half way; sbdm is strongest at "
                    "the start and wants 500 steps or more. It costs nothing.",
                ),
                io.Float.Input(
                    "norm", default=1.0, min=0.0, max=10.0, step=0.05,
                    tooltip="Scale of the diffusion: 0 is the ODE, 1 the usual amount; more wants more steps.",
                ),
                io.Combo.Input(
                    "last_step", options=[*LAST_STEPS, NO_LAST_STEP], default="mean",
                    tooltip="The way to sigma 0 at the end, without noise: mean is the drift of the SDE, euler the "
                    "flow, tweedie the expected picture (smoothest). none adds noise up to the end. Sigmas that end "
                    "above 0 have no last step. Costs one evaluation; none has no such cost.",
                ),
                io.Float.Input(
                    "last_step_size", default=0.04, min=0.001, max=0.5, step=0.005, round=False,
                    tooltip="The sigma at which the last step starts: the sigmas are squeezed to end there, as many as "
                    "before. At most half of the first sigma.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip=FOR)],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, solver: str, diffusion: str, norm: float, last_step: str, last_step_size: float
    ) -> io.NodeOutput:  # fmt: skip
        """Nothing runs yet."""
        last = None if last_step == NO_LAST_STEP else last_step
        return io.NodeOutput(FlowSampler(SdeSettings(solver, diffusion, norm, last, last_step_size)))
