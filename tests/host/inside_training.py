"""Checks inside a ComfyUI (see inside.py): training in the graph, beside what its files draw without a host."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
from host_process import close, encode, loaded, refused, stock
from inside_adapters import host_latent, own_latent
from inside_files import state_of

import comfy.model_management as management  # isort: skip
import comfy.utils  # isort: skip
import folder_paths  # isort: skip
import torch  # isort: skip
from PIL import Image  # isort: skip

RUNS = Path(folder_paths.get_output_directory()) / "zigma_training"
CAPTIONS = ("red fox", "green apple", "red apple", "fox")


def pictures(name: str = "squares", size: tuple[int, int] = (48, 32)) -> str:
    """A folder of four pictures in the host's input folder."""
    folder = Path(folder_paths.get_input_directory()) / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(CAPTIONS):
        picture = Image.new("RGB", size, (60 * number, 200 - 40 * number, 90))
        picture.paste((250, 240, 20 * number), (8, 4 + 3 * number, 30, 20))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return name


def dataset(pack, folder: str = "", **changes):
    given = {"kind": "auto", "size": 0, "buckets": False, "flips": False, "names_as_captions": False, "trigger": ""}
    return pack.node("ZigMaDataset").execute(folder, **given | changes).result


def trained(pack, parts, run_name: str, **changes):
    """Outputs of ZigMaTrain on `parts` (model, clip, vae); a fresh run unless `again`."""
    if not changes.pop("again", False):
        shutil.rmtree(RUNS / run_name, ignore_errors=True)
    data = changes.pop("data", None) or dataset(pack, pictures())[0]
    given = {
        "method": "lora", "steps": 6, "batch_size": 2, "learning_rate": 0.05, "rank": 4, "training_seed": 1,
        "precision": "fp32", "caption_dropout": 0.1, "sample_every": 0, "prompts": "red fox",
    }  # fmt: skip
    model, clip, vae = parts
    return pack.node("ZigMaTrain").execute(
        model, data, **given | changes, run_name=run_name, clip=clip, vae=vae
    ).result  # fmt: skip


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def same_weights(a, b) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_a_lora_trained_here_draws_what_it_draws_without_a_host(pack):
    parts = loaded(pack)
    before, plain = state_of(parts[0]), host_latent(pack, parts[0], parts[1])
    for method in ("lora", "lokr"):
        model, clip, file, losses, samples = trained(pack, parts, f"own_{method}", method=method, sample_every=3)
        assert clip is parts[1] and Path(file) == RUNS / f"own_{method}" / f"{method}.safetensors"
        got = host_latent(pack, model, clip)
        assert (got - plain).abs().max() > 0.05 * plain.std(), f"{method} changes nothing"
        with torch.inference_mode(False), torch.no_grad():
            bundle = pack.checkpoint.load_bundle(pack.file)
            pack.part("zigma.training.adapters").load_adapters(bundle.model, file)
        close(got, own_latent(pack, bundle), 1e-3 * plain.std().item())
        assert [entry["step"] for entry in losses] == list(range(1, 7))
        assert samples.dim() == 4 and samples.shape[-1] == 3 and samples.std() > 0.01
        assert (RUNS / f"own_{method}" / "samples" / "0000003.png").is_file()
    assert torch.equal(host_latent(pack, *parts[:2]), plain)
    after = state_of(parts[0])
    assert all(torch.equal(after[key], before[key]) for key in before)


def stopped_at(step: int, of: int, action: Callable) -> None:
    """Run an action, press Stop when its progress stands at a step, and let the host's exception through."""
    update, pressed = comfy.utils.ProgressBar.update_absolute, []

    def watched(bar, value, total=None, preview=None) -> None:
        update(bar, value, total, preview)
        if (value, total) == (step, of):
            pressed.append(value)
            management.interrupt_current_processing()

    comfy.utils.ProgressBar.update_absolute = watched
    try:
        action()
    except management.InterruptProcessingException:
        assert pressed, "it was stopped too early"
    else:
        raise AssertionError("Stop did not stop it")
    finally:
        comfy.utils.ProgressBar.update_absolute = update
    assert not management.processing_interrupted()


def check_a_run_that_was_stopped_and_queued_again_is_the_run_that_was_not(pack):
    parts = loaded(pack)
    for method in ("lora", "full"):
        given = {"method": method, "steps": 7, "learning_rate": 0.01}
        straight = trained(pack, parts, "straight", **given)
        for step in (2, 5):
            stopped_at(step, 7, lambda g=given, again=step > 2: trained(pack, parts, "stopped", again=again, **g))
            folders = sorted(path.name for path in (RUNS / "stopped" / "checkpoints").iterdir())
            assert folders[-1] == f"{step + 1:07d}", f"stopped at step {step}, but with {folders}"
        resumed = trained(pack, parts, "stopped", again=True, **given)
        same_weights(straight[2], resumed[2])
        assert [{**entry, "minutes": 0} for entry in resumed[3]] == [{**entry, "minutes": 0} for entry in straight[3]]
        assert torch.equal(straight[4], resumed[4])
        assert torch.equal(host_latent(pack, *straight[:2]), host_latent(pack, *resumed[:2]))


def check_a_finished_run_is_found_and_more_steps_go_on_with_it(pack):
    parts = loaded(pack)
    first = weights(trained(pack, parts, "longer", steps=3)[2])
    again = trained(pack, parts, "longer", steps=3, again=True)
    assert all(torch.equal(value, first[key]) for key, value in weights(again[2]).items())
    more = trained(pack, parts, "longer", steps=5, again=True)
    assert [entry["step"] for entry in more[3]] == [1, 2, 3, 4, 5]
    assert any(not torch.equal(value, first[key]) for key, value in weights(more[2]).items())


def check_stop_is_heard_while_pictures_are_opened_and_sheets_drawn(pack):
    parts = loaded(pack)
    stopped_at(2, 4, lambda: dataset(pack, pictures()))
    data = dataset(pack, pictures())[0]
    stopped_at(1, 4, lambda: trained(pack, parts, "early", data=data, steps=50))
    assert not list((RUNS / "early").glob("checkpoints/*"))
    file = trained(pack, parts, "early", data=data, steps=2)[2]  # nothing is in the way of it
    assert Path(file).is_file()


def check_all_weights_trained_here_are_a_model_with_the_words_it_learnt(pack):
    parts = loaded(pack)
    data = dataset(pack, pictures(), trigger="blot")[0]
    model, clip, file, _, _ = trained(pack, parts, "whole", method="full", steps=4, learning_rate=0.01, data=data)
    bundle = pack.checkpoint.load_bundle(file)
    assert "blot" in bundle.text_encoder.ids and Path(file).name == "model.safetensors"
    got, plain = host_latent(pack, model, clip), host_latent(pack, *parts[:2])
    with torch.inference_mode(False):
        close(got, own_latent(pack, bundle), 1e-3 * plain.std().item())
    assert (got - plain).abs().max() > 0.01 * plain.std()
    close(encode(clip, "blot fox")[0][0], bundle.text_encoder.encode(["blot fox"]), 1e-4)
    assert not torch.equal(encode(clip, "blot fox")[0][0], encode(clip, "fox")[0][0])


def check_what_is_on_the_model_is_trained_upon(pack):
    """A LoRA that is there belongs to the weights a run begins with, and stays on the output."""
    model, clip, vae = loaded(pack)
    patched = model.clone()
    key = "diffusion_model.blocks.0.mixer.in_proj.weight"
    patched.add_patches({key: ("diff", (0.3 * torch.ones_like(comfy.utils.get_attr(model.model, key)),))}, 1.0)
    ordered = pack.node("ZigMaScanOrder").execute(patched, "hilbert", "0-7", "all", 0).result[0]
    for given in (patched, ordered):
        made, _, file, *_ = trained(pack, (given, clip, vae), "upon")
        with torch.inference_mode(False), torch.no_grad():
            bundle = pack.checkpoint.load_bundle(Path(file).with_name("base.safetensors"))
            close(host_latent(pack, given, clip), own_latent(pack, bundle))
            pack.part("zigma.training.adapters").load_adapters(bundle.model, file)
            want = own_latent(pack, bundle)
        close(host_latent(pack, made, clip), want, 1e-3 * want.std().item())
    management.unload_all_models()
    own = comfy.utils.get_attr(model.model, key)
    assert torch.equal(own, weights(pack.file)[key.removeprefix("diffusion_model.")])


def check_the_hosts_random_numbers_go_on_as_if_nothing_was_trained(pack):
    parts, data = loaded(pack), dataset(pack, pictures())[0]
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    trained(pack, parts, "random", steps=2, data=data, sample_every=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]
    assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


def check_models_of_every_kind_are_trained(pack):
    """Labels, no condition, pixels, a text encoder of the host; each changes what is drawn."""
    for label, name in enumerate(("fox", "owl")):
        folder = Path(folder_paths.get_input_directory()) / "classes" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            Image.new("RGB", (48, 32), (120 * label, 90 * number, 30)).save(folder / f"{number}.png")
    classes = dataset(pack, "classes")
    assert "classes: 2 (fox 2, owl 2)" in classes[1]
    for name, data, changes in (
        ("class_null.safetensors", classes[0], {"prompts": "owl\n0"}),
        ("unconditional.safetensors", None, {"prompts": ""}),
        ("pixels.safetensors", dataset(pack, pictures("small", (12, 8)))[0], {}),
        ("both", None, {"method": "full"}),
    ):
        model, clip, vae = loaded(pack, "bare.safetensors" if name == "both" else name)
        if name == "both":
            vae, clip = loaded(pack)[2], _Clip()
        made, kept, file, _, samples = trained(pack, (model, clip, vae), "kinds", data=data, steps=3, **changes)
        assert kept is clip and samples.std() > 0.01, name
        change = weights(file)
        if changes.get("method") == "full":
            base = weights(Path(file).with_name("base.safetensors"))
            change = {key: value.float() - base[key] for key, value in change.items()}
        assert max(value.abs().max() for key, value in change.items() if "alpha" not in key) > 1e-3, name
        assert made.model.zigma_file.config == model.model.zigma_file.config


class _Clip:
    """A text encoder of the host as far as training asks for it: long texts have more windows, as CLIP-L's do."""

    tokenizer = None

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens(self, text: str) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        return torch.randn(1, 12 if len(text) > 8 else 6, 16, generator=generator)


def check_pictures_of_the_graph_are_a_dataset(pack):
    images = torch.rand(3, 32, 48, 3)
    data, report = dataset(pack, images=images, captions="red fox\n\napple")
    folder = Path(data.path)
    assert folder.is_relative_to(folder_paths.get_temp_directory()) and "captions: 2 of 3" in report
    kept = numpy.asarray(Image.open(folder / "0001.png"))
    assert abs(kept / 255 - images[1].numpy()).max() < 0.003
    assert dataset(pack, images=images, captions="red fox\n\napple")[0].path == data.path
    assert dataset(pack, images=images, captions="fox")[0].path != data.path
    assert "captions: 2 of 3" in dataset(pack, images=images, captions="fox\nowl\n")[1]
    made = trained(pack, loaded(pack), "graph", data=data, steps=2)
    assert Path(made[2]).is_file()


def check_a_dataset_is_looked_at_again_when_its_files_change(pack):
    node, name = pack.node("ZigMaDataset"), pictures("changing")
    before = node.fingerprint_inputs(folder=name, kind="auto")
    assert node.fingerprint_inputs(folder=name, kind="auto") == before
    pictures("changing", (24, 16))
    assert node.fingerprint_inputs(folder=name, kind="auto") != before
    assert "6 of 6" in dataset(pack, "badges")[1]
    folder = Path(folder_paths.get_input_directory()) / name
    outside = Path(folder_paths.get_temp_directory()) / "linked here"
    outside.mkdir(parents=True, exist_ok=True)
    (folder / "dead.png").symlink_to("/nowhere/dead.png")
    (folder / "linked").symlink_to(outside, target_is_directory=True)
    seen = [node.fingerprint_inputs(folder=name)]
    (outside / "new.txt").write_text("behind a link", encoding="utf-8")
    seen.append(node.fingerprint_inputs(folder=name))
    for part in (0, 1):
        (folder / f"s-{part}.tar").write_bytes(b"shard")
    seen += [node.fingerprint_inputs(folder=name), shards := node.fingerprint_inputs(folder=name + "/s-{0..1}.tar")]
    (folder / "s-1.tar").write_bytes(b"another shard")
    assert len(set(seen)) == 4 and node.fingerprint_inputs(folder=name + "/s-{0..1}.tar") != shards
    (folder / "metadata.jsonl").write_text("{}", encoding="utf-8")
    described = node.fingerprint_inputs(folder=name + "/metadata.jsonl")
    (folder / "s-0.tar").unlink()
    assert node.fingerprint_inputs(folder=name + "/metadata.jsonl") != described
    assert node.fingerprint_inputs(folder="~nobody-has-this-name/x") == "missing"


def check_a_run_whose_folder_was_deleted_is_run_again(pack):
    """A host keeps a node's outputs while its inputs stay: here a file that is no more."""
    node, parts = pack.node("ZigMaTrain"), loaded(pack)

    def fingerprint():
        return node.fingerprint_inputs(run_name="deleted", steps=2)

    shutil.rmtree(RUNS / "deleted", ignore_errors=True)
    before = fingerprint()
    trained(pack, parts, "deleted", steps=2)
    assert fingerprint() == before, "a run would be queued again at once"
    shutil.rmtree(RUNS / "deleted")
    gone = fingerprint()
    assert gone != before and fingerprint() == gone
    trained(pack, parts, "deleted", steps=2, again=True)
    assert fingerprint() == gone
    assert node.fingerprint_inputs(run_name="a/b") == ""


def check_a_saved_lora_is_listed_and_draws_the_same(pack):
    model, clip, vae = loaded(pack)
    made, _, file, losses, _ = trained(pack, (model, clip, vae), "kept")
    path = Path(pack.node("ZigMaSaveLora").execute(file, "zigma/%run%").result[0])
    second = Path(pack.node("ZigMaSaveLora").execute(file, "zigma/%run%").result[0])
    assert (path.name, second.name) == ("kept_00001_.safetensors", "kept_00002_.safetensors")
    assert {path, second} <= set(path.parent.iterdir())
    name = path.relative_to(folder_paths.get_folder_paths("loras")[0]).as_posix()
    assert name in folder_paths.get_filename_list("loras")
    want = host_latent(pack, made, clip)
    ours = pack.node("ZigMaLoraLoader").execute(model, name, 1.0).result[0]
    theirs = stock.LoraLoaderModelOnly().load_lora_model_only(model, name, 1.0)[0]
    assert torch.equal(host_latent(pack, ours, clip), want) and torch.equal(host_latent(pack, theirs, clip), want)
    plot = pack.node("ZigMaLossPlot").execute(losses, 300, 200).result[0]
    assert plot.shape == (1, 200, 300, 3) and len(plot.flatten(0, 2).unique(dim=0)) > 20
    shutil.rmtree(path.parent)


def check_mistakes_in_training_are_sentences(pack):
    parts = model, clip, vae = loaded(pack)
    empty = Path(folder_paths.get_input_directory()) / "nothing"
    empty.mkdir(exist_ok=True)
    for action, *words in (
        (lambda: dataset(pack), "got neither"),
        (lambda: dataset(pack, "nothing"), "nothing to train on: looked for pictures"),
        (lambda: dataset(pack, "squares", images=torch.rand(1, 8, 8, 3)), "got both"),
        (lambda: dataset(pack, images=torch.rand(3, 8, 8, 3), captions="a\nb"), "got 2 lines for 3 pictures"),
        (lambda: dataset(pack, pictures(), captions="a"), "leave captions empty"),
        (lambda: trained(pack, parts, "wrong", batch_size=5), "batch of 5 is larger than the 4"),
        (lambda: trained(pack, parts, "wrong", steps=0), "set steps to 1 or more: got 0"),
        (lambda: trained(pack, parts, "a/b", again=True), "plain name", "'a/b'"),
        (lambda: trained(pack, parts, "é" * 128, again=True), "shorter name", "128 characters", "255 bytes fit"),
        (lambda: trained(pack, parts, "..", again=True), "plain name"),
        (lambda: trained(pack, (model, clip, None), "wrong"), "connect vae"),
        (lambda: trained(pack, (model, None, vae), "wrong"), "connect clip"),
        (lambda: trained(pack, parts, "wrong", data=dataset(pack, pictures(), size=40)[0]), "multiples of 16 pixels"),
        (lambda: trained(pack, loaded(pack, "class.safetensors"), "wrong", prompts=""), "no label", "class folders"),
        (lambda: trained(pack, loaded(pack, "video.safetensors"), "wrong"), "takes clips of 3 frames"),
        (lambda: trained(pack, loaded(pack, "unconditional.safetensors"), "wrong"), "leave prompts empty"),
        (lambda: pack.node("ZigMaSaveLora").execute(str(pack.file), "a"), "is no LoRA of one"),
        (lambda: pack.node("ZigMaLossPlot").execute([], 300, 200), "no losses yet"),
    ):
        refused(action, *words)
    try:
        dataset(pack, "gone")
    except FileNotFoundError as error:
        assert "there is no" in str(error) and "gone" in str(error)
    else:
        raise AssertionError("a folder that is not there was taken")
    trained(pack, parts, "taken", steps=1)
    other = loaded(pack, "kind_shared.safetensors")
    refused(lambda: trained(pack, other, "taken", again=True), "choose another run_name", "another model")
    refused(lambda: trained(pack, parts, "taken", again=True, method="full"), "choose another run_name", "[adapter]")
    refused(lambda: trained(pack, parts, "taken", again=True, training_seed=5), "another run_name", "seed: 1 -> 5")
    data = dataset(pack, "badges", size=32)[0]
    refused(lambda: trained(pack, parts, "taken", again=True, data=data), "another run_name", "[data] size: 0 -> 32")
    data = dataset(pack, "badges")[0]
    refused(lambda: trained(pack, parts, "taken", again=True, data=data), "the pictures of", "have changed")
