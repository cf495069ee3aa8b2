"""Parts of training that the user can replace: model, optimizer, loss and augmentation.

`Custom` contains these parts, checks what they return, and names them in error messages. The files
of a run contain the `identities` of its custom parts, because a run can be resumed only with the
same parts.
"""

import contextlib
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from resnet56.data.batches import seeded
from resnet56.errors import Error, TrainingError, UsageError, one_line
from resnet56.runs.schema import CustomPart

# A module, or a function that takes the number of classes and returns a module. The module maps
# normalized float32 images (N, 3, 32, 32) to logits (N, classes).
ModelLike: TypeAlias = nn.Module | Callable[[int], nn.Module]
# Called with the parameters to train and `lr=`, like the classes of torch.optim.
OptimizerFactory: TypeAlias = Callable[..., torch.optim.Optimizer]
# float32 logits (B, C), and int64 labels (B,) or float32 probabilities (B, C) -> scalar.
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# uint8 images (B, 3, 32, 32) -> images of the same dtype and shape.
Augment: TypeAlias = Callable[[Tensor], Tensor]

WORDS = {"augment": "augmentation"}  # for messages


@dataclass(frozen=True)
class Custom:
    """The parts that replace built-in ones. None selects the built-in part."""

    model: ModelLike | None = None
    optimizer: OptimizerFactory | None = None
    loss: Loss | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        """Check that each part is callable."""
        for kind, part in self.parts().items():
            if not callable(part):
                raise UsageError(f"{kind} must be callable, not {one_line(repr(part))}")

    def parts(self) -> dict[str, Any]:
        """Return the custom parts by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {kind: part for kind, part in values.items() if part is not None}

    def identities(self) -> dict[str, CustomPart]:
        """Return the name and the hash of each part."""
        return {
            kind: {"name": name_of(part), "sha256": _digest(part)}
            for kind, part in self.parts().items()
        }

    def make_optimizer(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Return the custom optimizer. Raises UsageError if the optimizer is not valid."""
        assert self.optimizer is not None
        with self.reported("optimizer"):
            optimizer = self.optimizer(parameters, lr=lr)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(
                f"the optimizer {name_of(self.optimizer)} returned {_kind(optimizer)}; expected a "
                "torch.optim.Optimizer"
            )
        known = {id(parameter) for parameter in parameters}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if not all(id(parameter) in known for parameter in trained):
            raise UsageError(
                f"the optimizer created by {name_of(self.optimizer)} contains parameters that "
                "were not passed to this function"
            )
        return optimizer

    def compute_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Call `loss`. Raises TrainingError if the result is not a scalar that requires grad."""
        assert self.loss is not None
        with self.reported("loss"):
            loss = self.loss(logits, targets)
        name = name_of(self.loss)
        if not isinstance(loss, Tensor) or loss.ndim:
            hint = ", such as its mean" if isinstance(loss, Tensor) else ""
            raise TrainingError(
                f"the loss {name} returned {_kind(loss)}; expected a scalar tensor{hint}"
            )
        if not loss.requires_grad:
            raise TrainingError(f"the loss {name} does not depend on the logits")
        return loss

    def augmented(self, images: Tensor) -> Tensor:
        """Call `augment`. Raises TrainingError if the shape or the dtype of the images changes."""
        assert self.augment is not None
        with self.reported("augment"):
            result = self.augment(images)
        if not isinstance(result, Tensor) or (result.shape, result.dtype) != (
            images.shape,
            images.dtype,
        ):
            raise TrainingError(
                f"the augmentation {name_of(self.augment)} returned {_kind(result)}; expected "
                f"{_kind(images)}"
            )
        return result

    @contextlib.contextmanager
    def reported(self, kind: str) -> Iterator[None]:
        """Add the name of the part to its exceptions. Has no effect on built-in parts."""
        try:
            yield
        except Error:
            raise
        except Exception as error:
            part = getattr(self, kind)
            if part is None:
                raise
            word = WORDS.get(kind, kind)
            raise TrainingError(
                f"the {word} {name_of(part)} raised {type(error).__name__}: {one_line(error)}"
            ) from error

    def check(self, classes: int, images: Tensor, *, mixed: bool) -> None:
        """Call the loss and the augmentation once, before the run writes files.

        Args:
            classes: number of classes.
            images: some uint8 training images (B, 3, 32, 32), on the training device.
            mixed: whether targets can be probabilities.

        Raises:
            Error: a part raises an exception or returns an unexpected value.
        """
        if isinstance(self.loss, nn.Module):
            if any(True for _ in self.loss.parameters()):
                raise UsageError(
                    f"the loss {name_of(self.loss)} has parameters, which are not trained; make "
                    "them part of the model"
                )
            self.loss.to(images.device)
        with seeded(0, images.device):
            if self.augment is not None:
                self.augmented(images)
            if self.loss is not None:
                logits = torch.zeros(len(images), classes, device=images.device, requires_grad=True)
                labels = torch.arange(len(images), device=images.device) % classes
                self.compute_loss(logits, labels)
                if mixed:
                    self.compute_loss(logits, nn.functional.one_hot(labels, classes).float())


def make_model(model: ModelLike, classes: int, device: torch.device, seed: int = 0) -> nn.Module:
    """Return the module on `device`, after checking its outputs for two images.

    Args:
        model: a module, which is not copied, or a function that takes the number of classes and
            returns a module.
        classes: number of classes.
        device: device of the module.
        seed: seed of PyTorch's random numbers while the function runs.

    Raises:
        UsageError: the function does not return a module, or the output of the module does not have
            the shape (N, classes).
        TrainingError: the function or the module raises an exception.
    """
    name, custom = name_of(model), Custom(model=model)
    with seeded(seed, device), custom.reported("model"):
        module = model if isinstance(model, nn.Module) else model(classes)
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"the model {name} returned {_kind(module)}; expected a torch.nn.Module"
            )
        if not any(True for _ in module.parameters()):
            raise UsageError(f"the model {name} has no parameters")
        entries = module.state_dict().items()
        if extra := [key for key, value in entries if not isinstance(value, Tensor)]:
            raise UsageError(
                f"the state dict of the model {name} contains values that are not tensors, such as "
                f"{extra[0]}"
            )
        module.to(device)
        training = module.training
        with torch.no_grad():
            logits = module.eval()(torch.zeros(2, 3, 32, 32, device=device))
        module.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        raise UsageError(
            f"the output of the model {name} for 2 images is {_kind(logits)}; expected logits of "
            f"shape (2, {classes}) for {classes} classes"
        )
    return module


def name_of(part: object) -> str:
    """Return the qualified name of a function or class, or of the class of any other object."""
    while isinstance(part, functools.partial):
        part = part.func
    named: Any = part if hasattr(part, "__qualname__") else type(part)
    module = getattr(named, "__module__", None) or "builtins"
    if module == "__main__":  # use the name that the object would have in the imported script
        file = getattr(sys.modules["__main__"], "__file__", None)
        module = Path(file).stem if file else module
    return f"{module}.{named.__qualname__}"


def difference(saved: Mapping[str, CustomPart], current: Mapping[str, CustomPart]) -> str | None:
    """Describe the first difference between the saved and the current parts, or return None."""
    for kind in sorted({*saved, *current}):
        word = WORDS.get(kind, kind)
        if kind not in saved:
            return f"with the built-in {word}; omit {kind}={current[kind]['name']}"
        text = f"with the custom {word} {saved[kind]['name']}"
        if kind not in current:
            return f"{text}; pass it in Python as {kind}="
        if saved[kind]["name"] != current[kind]["name"]:
            return f"{text}, not {current[kind]['name']}; pass the same {kind}="
        if saved[kind]["sha256"] != current[kind]["sha256"]:
            return f"{text}, whose source code or settings have changed; restore them"
    return None


def _digest(part: object) -> str:
    """Return a SHA-256 hash of the source code and the settings of a part."""
    text = _describe(part, set())
    if not isinstance(part, nn.Module | type) and hasattr(part, "__dict__"):
        text += _describe(vars(part), set())
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(value: object, seen: set[int]) -> str:
    """Return the source code and the settings of an object as text.

    Settings are the numbers, strings, functions and classes in the arguments of a
    `functools.partial` or in the closure and the defaults of a function, including those nested in
    containers. For a module, the text contains its `repr`, but not its weights, which are in the
    checkpoint.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in seen:
        return "..."
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        items = (f"{key!r}: {_describe(item, seen)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple | set | frozenset):
        described = [_describe(item, seen) for item in value]
        ordered = sorted(described) if isinstance(value, set | frozenset) else described
        return f"{type(value).__name__}({', '.join(ordered)})"
    if isinstance(value, functools.partial):
        settings = _describe((value.args, value.keywords), seen)
        return f"partial({_describe(value.func, seen)}, {settings})"
    if isinstance(value, nn.Module):
        return f"{_source(type(value))}\n{value!r}"
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        settings = _describe((cells, value.__defaults__, value.__kwdefaults__), seen)
        return f"{_source(value)}\n{settings}"
    if isinstance(value, MethodType):
        owner = value.__self__
        attributes = vars(owner) if hasattr(owner, "__dict__") else {}
        is_plain = not isinstance(owner, nn.Module | type)
        settings = _describe(attributes, seen) if is_plain else ""
        return f"{_describe(value.__func__, seen)} of {_describe(owner, seen)} {settings}"
    return _source(value if hasattr(value, "__qualname__") else type(value))


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # the variable has not been assigned yet
        return False
    return True


def _source(part: Any) -> str:
    """Return the source code of a function or class, or its bytecode if no source is available.

    For a lambda, return the bytecode, because the source line can contain other code.
    """
    if getattr(part, "__name__", "") != "<lambda>":
        with contextlib.suppress(OSError, TypeError):  # defined interactively, or in C
            return inspect.getsource(part)
    functions = [part] if isinstance(part, FunctionType) else _methods(part)
    return f"{name_of(part)} {' '.join(_bytecode(function.__code__) for function in functions)}"


def _methods(part: Any) -> list[FunctionType]:
    attributes = vars(part) if isinstance(part, type) else {}
    return [value for value in attributes.values() if isinstance(value, FunctionType)]


def _bytecode(code: CodeType) -> str:
    constants = (_bytecode(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return f"{code.co_code.hex()} {code.co_names} {' '.join(constants)}"


def _kind(value: object) -> str:
    """Describe a returned value for an error message."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}" if value is not None else "None"
