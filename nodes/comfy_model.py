"""The one adapter between ZigMa and the host's classes for models; comfy_text.py and comfy_vae.py are its sisters.

The host runs time the other way: its sigma is 1 at the noise and 0 at the data, and it wants d x / d sigma. So

    sigma = 1 - t        output = -v

and its latents of videos are (b, c, f, h, w), where the network's are (b, f, c, h, w),
and nothing outside this file knows. Everything else is the host's own: its samplers, LoRA patches, offloading.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from torch import Tensor

from ..zigma.checkpoint import CheckpointFile, LatentFormat, read_checkpoint
from ..zigma.conditions import ConditionFacts
from ..zigma.flow import linear_velocity
from ..zigma.host_files import host_description
from ..zigma.model import Condition, ZigMa
from ..zigma.sampling import flow_of
from .comfy_conditions import LABELS, NO_NULL, check_channels, check_latent, model_conditions
from .comfy_patches import patch_loose_parameters
from .layer_orders import SCAN_ORDERS, LayerOrder, make_order, schedule_of

__all__ = ["WEIGHT_DTYPES", "as_zigma", "build_model", "current_orders", "facts_of"]

log = logging.getLogger(__name__)

KEPT_CONDITIONS = 4  # of a sampling run: batches of conditions that take turns within a step
KEPT_SCHEDULES = 8  # of token orders: clones of one MODEL whose sampling takes turns, on a few grids

# What weights may be stored in; the host computes in what its device is good at.
WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip


class HostZigMa(ZigMa):
    """ZigMa as the host calls it: sigma instead of time, d x / d sigma instead of the velocity."""

    def __init__(self, *, zigma_file: CheckpointFile, dtype, device, operations, **_) -> None:
        class Operations(operations):
            # Kernels bypass a layer's forward; this way they get its weights cast, patched and loaded all the same.
            read_weights = staticmethod(comfy.ops.cast_bias_weight)

        super().__init__(
            zigma_file.config, zigma_file.token_orders, operations=Operations, device=device, dtype=dtype
        )  # fmt: skip
        self.dtype = dtype
        self.in_channels = self.config.in_channels  # RenormCFG asks for it
        self._flow = flow_of(zigma_file.metadata)
        self._told_of_cfg = False
        self._overridden: dict[tuple, list[Tensor]] = {}
        self._encoded: list[tuple[Tensor, torch.dtype, Condition]] | None = None  # None: no run, or one that may not

    def reset_parameters(self) -> None:
        """Nothing: a file's weights follow, and initial ones cannot be drawn in 8 bits."""

    def forward(
        self, x: Tensor, timestep: Tensor, context=None, control=None, transformer_options=None, **conditions
    ) -> Tensor:
        """x (b, c, [f,] h, w) of any h and w, timestep = sigma (b,), context (b, m, d_context) -> d x / d sigma.

        Among the conditions are the labels (b,) of a class model. Nodes may wrap this call, as they do of the host's
        own models: EasyCache leaves it out.
        """
        extension, options = comfy.patcher_extension, transformer_options or {}
        wrappers = extension.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL, options)
        call = extension.WrapperExecutor.new_class_executor(self._evaluate, self, wrappers)
        return call.execute(x, timestep, context, control, options, **conditions)

    def _evaluate(
        self, x: Tensor, timestep: Tensor, context, control, transformer_options: dict, **conditions
    ) -> Tensor:  # fmt: skip
        if NO_NULL in conditions:
            self._without_null(conditions[NO_NULL])
        t = (1 - timestep.float()).expand(len(x))
        video, p, (height, width) = self.config.video_frames > 0, self.config.patch_size, x.shape[-2:]
        # A condition's area may be of any size, and comes as a latent of its own; the rest of a token is then cut off.
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (1, p, p) if video else (p, p))
        x = x.transpose(1, 2) if video else x
        schedule = transformer_options.get(SCAN_ORDERS)
        orders = None if schedule is None else self._scheduled(schedule, x)
        y = self._condition(x, t, context) if self.config.has_text else conditions.get(LABELS)
        predict = functools.partial(super().forward, y=y, token_orders=orders)
        v = linear_velocity(predict, *self._flow)(x, t)[..., :height, :width]
        return -(v.transpose(1, 2) if video else v)

    def _without_null(self, sentence: str) -> None:
        """Guidance asks for a null condition that there is not."""
        if sentence:
            raise ValueError(sentence)
        if not self._told_of_cfg:
            self._told_of_cfg = True
            log.warning("set cfg to 1: this model takes no condition, so guidance changes nothing and costs a half")

    def begin_run(self, weights_stay: bool) -> None:
        """Until `end_run` keep what conditions come to, if the weights stay what they are."""
        self._encoded = [] if weights_stay else None

    def end_run(self) -> None:
        """Forget what conditions came to, and keep nothing until the next run."""
        self._encoded = None

    def _condition(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor | Condition | None:
        """What the context came to earlier in this sampling run: the same at every step. Outside one, the context.

        Known by its contents. The host's uuids would not do: a guider's are the same in all its runs, and whatever
        cuts or replaces a condition on its way here leaves them as they are.
        """
        kept = self._encoded
        if kept is None or context is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return context
        kind = (context.shape, context.dtype, context.device)
        for known, dtype, condition in kept:
            if dtype == x.dtype and (known.shape, known.dtype, known.device) == kind and torch.equal(known, context):
                return condition
        self._check_inputs(x, t, context)
        condition = self.encode_condition(context, x.dtype)
        kept.append((context.clone(), x.dtype, condition))
        del kept[:-KEPT_CONDITIONS]
        return condition

    def _scheduled(self, schedule: tuple[LayerOrder | None, ...], x: Tensor) -> list[Tensor]:
        """The orders of a graph's schedule for x, in the network's layout; layers left alone keep the model's own."""
        p = self.config.patch_size
        grid = (x.shape[-2] // p, x.shape[-1] // p)
        frames = x.shape[1] if self.config.video_frames else 0
        key = (schedule, grid, frames, x.device)
        if key not in self._overridden:
            with torch.inference_mode(False):  # as ordinary tensors the network prepares them once, not in every step
                self._overridden[key] = self._made(schedule, grid, frames, x.device)
            for oldest in list(self._overridden)[:-KEPT_SCHEDULES]:
                del self._overridden[oldest]
        return self._overridden[key]

    def _made(
        self, schedule: tuple[LayerOrder | None, ...], grid: tuple[int, int], frames: int, device: torch.device
    ) -> list[Tensor]:
        own = self.layer_orders(*grid, frames) if None in schedule else [None] * len(schedule)
        made = {entry: make_order(entry, grid).to(device) for entry in dict.fromkeys(schedule) if entry is not None}
        return [order.to(device) if entry is None else made[entry] for order, entry in zip(own, schedule, strict=True)]


class ZigMaLatent(comfy.latent_formats.LatentFormat):
    """The latent format that a model file states, as the host's class."""

    def __init__(self, latent: LatentFormat, video: bool = False) -> None:
        self.zigma = latent
        self.latent_dimensions = 3 if video else 2
        self.latent_channels = latent.channels
        self.spacial_downscale_ratio = latent.downscale
        if latent.rgb_factors is not None:
            self.latent_rgb_factors = [list(row) for row in latent.rgb_factors]
            self.latent_rgb_factors_bias = None if latent.rgb_bias is None else list(latent.rgb_bias)

    def process_in(self, latent: Tensor) -> Tensor:
        """Latent of the VAE -> latent of the model."""
        check_channels(latent, self.latent_channels)
        return self._by_frame(self.zigma.to_model, latent)

    def process_out(self, latent: Tensor) -> Tensor:
        """Latent of the model -> latent of the VAE."""
        return self._by_frame(self.zigma.to_vae, latent)

    @staticmethod
    def _by_frame(change, latent: Tensor) -> Tensor:
        """What works on the last three axes (c, h, w), of videos (b, c, f, h, w) too."""
        return change(latent.transpose(1, 2)).transpose(1, 2) if latent.ndim == 5 else change(latent)


class HostConfig(comfy.supported_models_base.BASE):
    """What the host's BaseModel asks a model's configuration for."""

    sampling_settings = {"shift": 1.0, "multiplier": 1.0}  # noqa: RUF012 - the host's convention; timestep = sigma
    supported_inference_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012

    def __init__(self, file: CheckpointFile) -> None:
        # The description alone: this lives as long as the model, whose weights would be in memory twice.
        text, vae = (None if state is None else {} for state in (file.text_state, file.vae_state))
        file = dataclasses.replace(file, state_dict={}, text_state=text, vae_state=vae)
        super().__init__({"zigma_file": file, "in_channels": file.config.in_channels})
        self.latent_format = ZigMaLatent(file.latent, video=file.config.video_frames > 0)

    def inpaint_model(self) -> bool:
        """No: the default takes more than four channels for an inpainting model."""
        return False

    def get_model(self, state_dict, prefix="", device=None) -> HostModel:
        """The host's wrapper around an empty network."""
        return HostModel(self, device=device)


class HostModel(comfy.model_base.BaseModel):
    """The host's wrapper: flow prediction (CONST), sigmas from 1 to 0."""

    def __init__(self, config: HostConfig, device=None) -> None:
        super().__init__(config, model_type=comfy.model_base.ModelType.FLOW, device=device, unet_model=HostZigMa)
        self.zigma_file: CheckpointFile = config.unet_config["zigma_file"]  # without its tensors

    def extra_conds(self, **given) -> dict:
        """What forward gets of a condition; the last look at the inputs of a run, and the first at its latent."""
        file = self.zigma_file
        check_latent(file.config, file.latent.downscale, given["noise"])
        others = super().extra_conds(**given)
        others.pop("c_crossattn", None)
        return {**others, **model_conditions(file.config, file.condition, given)}

    def apply_model(self, x: Tensor, t: Tensor, *arguments, **keywords) -> Tensor:
        """One evaluation. Whatever sampler asks for it, Stop stops before the next: a host asks once in a step."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not isinstance(self.model_sampling, comfy.model_sampling.CONST):
            raise ValueError(
                "take out the ModelSampling node between loader and sampler, or use ModelSamplingAuraFlow: it says "
                "that this model predicts something else than a flow, which would spoil the picture"
            )
        if getattr(self.model_sampling, "multiplier", 1.0) != 1.0:
            raise ValueError(
                "use ModelSamplingAuraFlow in place of ModelSamplingSD3, or the shift of ZigMa Scheduler: got a model "
                f"whose times run to {self.model_sampling.multiplier:g}, expected them to run to 1 as ZigMa counts them"
            )
        return super().apply_model(x, t, *arguments, **keywords)

    def state_dict_for_saving(self, *state_dicts, **more) -> dict[str, Tensor]:
        """What the host's savers write: also what our loader has to know of a model."""
        return {**super().state_dict_for_saving(*state_dicts, **more), **host_description(self.zigma_file)}


def build_model(file: CheckpointFile, weight_dtype: str = "auto", disable_dynamic: bool = False):
    """A host MODEL (ModelPatcher) with the denoiser of a file.

    Args:
        file: with its tensors.
        weight_dtype: what the weights are stored in, a key of WEIGHT_DTYPES; auto is the host's choice.
        disable_dynamic: of newer hosts: a model that they load as older ones do.
    """
    management = comfy.model_management
    parameters = sum(tensor.numel() for tensor in file.state_dict.values())
    device, offload = management.get_torch_device(), management.unet_offload_device()
    supported = HostConfig.supported_inference_dtypes
    dtype = WEIGHT_DTYPES[weight_dtype]
    if dtype is None:
        dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported)
    config = HostConfig(file)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    with torch.inference_mode(False):  # nodes run in it, and training could not differentiate what was made there
        model = config.get_model(file.state_dict, device=offload)
        model.diffusion_model.load_state_dict(file.state_dict)
    model.eval().requires_grad_(False)
    patcher = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        # What newer hosts use for their own models, with finer offloading; it has another name there.
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    patcher = patcher(model, load_device=device, offload_device=offload)
    # How newer hosts make a model of their own for hooks, torch.compile and further devices.
    patcher.cached_patcher_init = (_build_again, (file.path, file.metadata.get("zigma.weights"), weight_dtype))
    events = comfy.patcher_extension.CallbacksMP
    patcher.add_callback(events.ON_LOAD, patch_loose_parameters)
    patcher.add_callback(events.ON_PRE_RUN, _on_run)
    patcher.add_callback(events.ON_CLEANUP, _on_other_weights)
    patcher.add_callback(events.ON_APPLY_HOOKS, _on_other_weights)  # hooks patch weights in the middle of a run
    return patcher


def _build_again(path, weights: str | None, weight_dtype: str, disable_dynamic: bool = False):
    file = read_checkpoint(path, "ema" if weights in (None, "ema") else "model")
    return build_model(file, weight_dtype, disable_dynamic)


def _on_run(patcher) -> None:
    """A sampling run begins, its weights in place. Functions of nodes that make weights may look at the time."""
    network = patcher.model.diffusion_model
    if isinstance(network, HostZigMa):  # a node may have put another in its place
        network.begin_run(weights_stay=not (patcher.weight_wrapper_patches or patcher.injections))


def _on_other_weights(patcher, *_) -> None:
    """The weights are no longer those that the run began with, or it is over."""
    network = patcher.model.diffusion_model
    if isinstance(network, HostZigMa):
        network.end_run()


def as_zigma(model) -> HostZigMa:
    """The network inside a host MODEL.

    Raises:
        ValueError: it is another kind of model.
    """
    network = model.model.diffusion_model
    if not isinstance(network, HostZigMa):
        raise ValueError(
            f"got a MODEL of the kind {type(network).__name__}, expected a ZigMa: connect the MODEL of the ZigMa "
            "Model Loader"
        )
    return network


def facts_of(model) -> ConditionFacts:
    """What the file of a host MODEL says of its conditions; ValueError as `as_zigma`."""
    as_zigma(model)
    return model.model.zigma_file.condition


def current_orders(model) -> list[Tensor]:
    """The orders that the layers of a host MODEL read in, on the grid it was trained on; those of a graph included."""
    network = as_zigma(model)
    config, schedule = network.config, tuple(schedule_of(model, network.config.depth))
    frames = [config.video_frames] if config.video_frames else []
    return network._scheduled(schedule, torch.empty(1, *frames, config.in_channels, *config.img_dim))
