"""Grad-CAM of every convolution: one pass for all layers, against one pass per layer.

layermend's `layer_maps` needs one forward and one backward pass however many layers there are;
pytorch-grad-cam and Captum are called once per layer, through their public interface, as their
users would. All three explain the same classes of the same images on the same network, with the
same threads; layermend's raw maps are compared with Captum's. pytorch-grad-cam returns maps at
image size as numpy, scaled to [0, 1]: its call is timed as it is.

    python benchmarks/saliency_speed.py [--threads 1] [--batch-size 4] [--repeats 7]
"""

from __future__ import annotations

import argparse
from typing import Any

import efficientnet_lite0
import torch
from captum.attr import LayerGradCam
from results_file import configuration, print_table, timed, write_results
from torch import Tensor, nn

from audit.networks import Program, architectures
from audit.networks.torchvision_import import import_torchvision
from audit.saliency import layer_maps

torchvision = import_torchvision()
from pytorch_grad_cam import GradCAM  # noqa: E402  (it imports torchvision)
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

INPUT_SIZE = (224, 224)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--repeats", type=int, default=7, help="of layermend; the loops run --loop-repeats"
    )
    parser.add_argument("--loop-repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    rows = [
        compare(name, network, options)
        for name, network in (("efficientnet", efficientnet()), ("vgg16", vgg16()))
    ]
    summary = {
        f"{row['network']}_vs_{peer}": row[f"{peer}_s"] / row["layermend_s"]
        for row in rows
        for peer in ("gradcam", "captum")
    }
    summary["max_relative_error"] = max(row["max_relative_error"] for row in rows)
    config = configuration("cpu", "captum", "grad-cam", **vars(options), input_size=INPUT_SIZE)
    shown = ("network", "layers", "layermend_s", "gradcam_s", "captum_s", "max_relative_error")
    print_table(
        "Grad-CAM of all layers, seconds a batch", [{k: row[k] for k in shown} for row in rows]
    )
    print_table("times faster", [summary])
    print(write_results("saliency_speed", summary=summary, config=config, rows=rows))


def efficientnet() -> nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet weights."""
    network = architectures.build(efficientnet_lite0.ARCH)
    network.load_state_dict(efficientnet_lite0.pretrained_state(), strict=False)
    return network.eval()


def vgg16() -> nn.Module:
    """Return VGG-16 with random weights: time does not depend on them."""
    return torchvision.models.vgg16(weights=None).eval()


def compare(name: str, network: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Return times and agreement on one network."""
    convolutions = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    images = torch.randn(options.batch_size, 3, *INPUT_SIZE)
    program = Program.capture(network, INPUT_SIZE)
    with torch.no_grad():
        targets = network(images).argmax(dim=1)

    def layermend() -> dict[str, Tensor]:
        return layer_maps(program, images, targets, layers=list(convolutions))

    def captum() -> dict[str, Tensor]:
        return {
            # Detached at once: Captum's maps hold the graph of their forward pass.
            layer: LayerGradCam(network, module)
            .attribute(images, target=targets, relu_attributions=True)
            .detach()
            for layer, module in convolutions.items()
        }

    def gradcam() -> None:
        wanted = [ClassifierOutputTarget(int(target)) for target in targets]
        for module in convolutions.values():
            with GradCAM(model=network, target_layers=[module]) as explain:
                explain(input_tensor=images, targets=wanted)

    ours, theirs = layermend(), captum()
    times = {
        "layermend": timed(layermend, repeats=options.repeats),
        "gradcam": timed(gradcam, repeats=options.loop_repeats),
        "captum": timed(captum, repeats=options.loop_repeats),
    }
    return {
        "network": name,
        "layers": len(convolutions),
        **{f"{who}_s": value["median_s"] for who, value in times.items()},
        "max_relative_error": max(
            _relative_error(ours[layer], theirs[layer].squeeze(1)) for layer in convolutions
        ),
        "times": times,
    }


def _relative_error(maps: Tensor, reference: Tensor) -> float:
    """The largest difference of two layers' maps (B, h, w), relative to the largest value."""
    return float((maps - reference).abs().max() / reference.abs().max().clamp(min=1e-12))


if __name__ == "__main__":
    main()
