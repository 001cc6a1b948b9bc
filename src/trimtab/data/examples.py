"""The kinds of example that a row can become."""

from __future__ import annotations

from dataclasses import dataclass, field

Label = str | int | bool | float


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user, assistant or tool; an assistant turn with `trained=False` is only read."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example; the abstract base of the four kinds. Equal content makes equal examples, whatever their rows."""

    row: int = field(default=0, compare=False)
    """Its row in the file, from 1; 0 when it came from no file."""

    def prompt_key(self) -> tuple[str, ...]:
        """What the model is asked, white space normalised: examples with equal keys stay on one side of a split."""
        raise NotImplementedError


@dataclass(frozen=True)
class Conversation(Example):
    """A chat; what follows the last assistant turn is not trained on."""

    messages: tuple[Message, ...]

    def prompt_key(self) -> tuple[str, ...]:
        """The user's words before the first answer to them; the system prompt does not tell prompts apart."""
        asked: list[str] = []
        for message in self.messages:
            if message.role == "assistant" and asked:
                break
            if message.role not in ("system", "assistant"):
                asked.append(squeezed(message.content))
        return tuple(asked) or tuple(squeezed(message.content) for message in self.messages)


@dataclass(frozen=True)
class PromptCompletion(Example):
    """A prompt and the completion to be learned, with an optional system prompt."""

    prompt: str
    completion: str
    system: str = ""

    def prompt_key(self) -> tuple[str, ...]:
        """The prompt; the system prompt does not tell prompts apart."""
        return (squeezed(self.prompt),)


@dataclass(frozen=True)
class Text(Example):
    """Plain text for language modelling."""

    text: str

    def prompt_key(self) -> tuple[str, ...]:
        """The whole text."""
        return (squeezed(self.text),)


@dataclass(frozen=True)
class Labelled(Example):
    """One text, or a pair of them, with a class label (str, int, bool) or a number to regress to (float)."""

    text: str
    pair: str | None
    label: Label

    def prompt_key(self) -> tuple[str, ...]:
        """The text or the pair."""
        return (squeezed(self.text),) if self.pair is None else (squeezed(self.text), squeezed(self.pair))


def squeezed(text: str) -> str:
    """A text with every stretch of white space as one blank."""
    return " ".join(text.split())
