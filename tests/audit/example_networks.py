"""Small networks of every kind that the graph has to cope with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = (24, 24)
CLASSES = 5


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * 12 * 12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pool(self.relu1(self.conv1(images)))
        return self.fc(self.flatten(self.relu2(self.conv2(hidden))))


class Residual(nn.Module):
    """Batch norm, a residual and a projection that runs beside the main branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(6, 8, 1)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.bn(self.stem(images)))
        main = self.bn2(self.conv2(self.relu1(self.conv1(hidden))))
        hidden = self.relu2(main + self.down(hidden))
        return self.fc(hidden.mean(dim=(2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.project = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.act(self.bn(self.dw(self.act(self.expand(images)))))
        return self.fc(F.adaptive_avg_pool2d(self.project(hidden), 1).flatten(1))


class InPlace(nn.Module):
    """In-place rectifiers straight after convolutions, in-place addition, dropout."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.inplace = inplace
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.relu1 = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=inplace)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.relu1(self.conv1(images))
        after = self.conv2(hidden)
        if self.inplace:
            after += hidden
        else:
            after = after + hidden
        return self.fc(self.drop(self.relu2(after).mean(dim=(2, 3))))


class Reused(nn.Module):
    """One rectifier and one convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.relu(self.stem(images))
        hidden = self.relu(self.shared(hidden))
        hidden = self.relu(self.shared(hidden))
        return self.fc(hidden.mean(dim=(2, 3)))


class Functional(nn.Module):
    """No sub-modules: parameters and calls of torch.nn.functional, concatenation, a batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(6, 3, 3, 3))
        self.second = nn.Parameter(torch.empty(6, 6, 3, 3))
        self.head = nn.Parameter(torch.empty(CLASSES, 12))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, images: Tensor) -> Tensor:
        batch = images.shape[0]
        left = F.relu(F.conv2d(images, self.first, padding=1))
        right = F.relu(F.conv2d(left, self.second, padding=1))
        both = torch.cat([left, right], dim=1).mean(dim=(2, 3)).reshape(batch, -1)
        return F.linear(both, self.head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "depthwise": Depthwise,
    "in-place": InPlace,
    "reused": Reused,
    "functional": Functional,
}


def network(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a seeded network in eval mode, its batch-norm statistics away from their defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = NETWORKS[name]()
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean = torch.randn(part.num_features) * 0.2
                part.running_var = torch.rand(part.num_features) + 0.5
                nn.init.normal_(part.weight, 1, 0.2)
                nn.init.normal_(part.bias, 0, 0.2)
    return made.eval().to(dtype)


def images(count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(count, 3, *SIZE, generator=generator, dtype=torch.float64).to(dtype)


def labels(count: int = 4) -> Tensor:
    return torch.arange(count) % CLASSES
