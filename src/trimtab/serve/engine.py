"""The decode loop of the server: one thread that reads prompts, steps all running rows, and lets them join and leave.

Requests wait in one queue of limited length. Before every step, waiting ones join while there are free rows; after it,
those that are done leave. Adapters whose rows cannot share a forward (they edit weights that are read raw) have a lane
of their own, and lanes take turns.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import rearrange
from trimtab.core.errors import UserError
from trimtab.core.state import state_of
from trimtab.evaluate.generate import room_of, stop_ids
from trimtab.serve.lane import Lane, Row, check_cache
from trimtab.serve.sampling import Choice, Chooser, Sampling
from trimtab.serve.wording import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WAKE_SECONDS = 0.5
"""How long an idle engine sleeps before it looks whether it should stop."""


@dataclass(frozen=True)
class Piece:
    """Text that is certain now, and the tokens chosen since the last piece."""

    text: str
    tokens: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer: `stop` or `length`, and how many tokens were written."""

    reason: str
    written: int


@dataclass(frozen=True)
class Failed:
    """An answer that will not come to its end."""

    message: str


@dataclass(eq=False)
class Job:
    """A request: what to answer from, with which adapter, and who is told. `tell` is called in the engine's thread."""

    ids: Sequence[int]
    adapter: str | None
    max_tokens: int
    tell: Callable[[Piece | Done | Failed], None]
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    cancelled: bool = False
    row: Row = field(init=False)
    chooser: Chooser = field(init=False)
    answer: Answer = field(init=False)
    written: int = 0
    unsent: list[Choice] = field(default_factory=list)


class QueueFull(Exception):
    """There is no place left in the queue."""


class Engine:
    """A model with its adapters, answering many requests at once.

    `rows` is how many sequences run at a time, `queue` how many may wait.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, rows: int = 16, queue: int = 64
    ) -> None:
        check_cache(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.limit, self.places = rows, queue
        self.stops = stop_ids(model, tokenizer)
        self.waiting: deque[Job] = deque()
        self.running: dict[Row, Job] = {}
        self.lanes: dict[str | None, Lane] = {}
        self.changed = threading.Condition()
        self.stopping = False
        self.thread = threading.Thread(target=self.run, name="trimtab-engine", daemon=True)
        self.alone: dict[str, bool] = {}

    # ---------------------------------------------------------------------------------------------- from any thread

    def start(self) -> None:
        """Begin to answer."""
        self.thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """Let no more step begin, and tell everyone who waits."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        if wait and self.thread.is_alive():
            self.thread.join()

    def submit(self, job: Job) -> None:
        """Put a request into the queue; `QueueFull` where it has no place, `UserError` where it does not fit."""
        self.check(job)
        with self.changed:
            if self.stopping or len(self.waiting) >= self.places:
                raise QueueFull
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants this answer any more: it leaves the queue at once, or its row before the next step."""
        with self.changed:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)

    def room(self, adapter: str | None) -> int:
        """How many tokens, prompt and answer together, an adapter's rows have positions for."""
        return room_of(self.model, [adapter] if adapter else [])

    def check(self, job: Job) -> None:
        """Refuse a prompt that cannot be answered."""
        room = self.room(job.adapter)
        if not job.ids:
            raise UserError("the prompt has no tokens")
        if len(job.ids) >= room:
            raise UserError(f"the prompt has {len(job.ids)} tokens; the model takes {room - 1} and writes the rest")

    # ------------------------------------------------------------------------------------------ in the engine's thread

    def run(self) -> None:
        """Step until stopped."""
        while True:
            with self.changed:
                while not (self.stopping or self.waiting or self.running):
                    self.changed.wait(WAKE_SECONDS)  # a signal handler can only set `stopping`
                if self.stopping:
                    break
                free = self.limit - len(self.running)
                joining = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
                for job in joining:
                    job.row = Row(list(job.ids), (job.adapter,) if job.adapter else ())
                    self.running[job.row] = job
            with torch.no_grad():
                for name in dict.fromkeys([*self.lanes, *map(self.lane_of, joining)]):
                    self.turn(name, [job for job in joining if self.lane_of(job) == name])
        left = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self.lanes.clear()
        for job in left:
            job.tell(Failed("the server is shutting down"))

    def lane_of(self, job: Job) -> str | None:
        """The lane of a request: None for those that mix, else the adapter."""
        name = job.adapter
        if name is not None and name not in self.alone:
            try:
                rearrange(self.model, [name, None])
                self.alone[name] = False
            except UserError:
                self.alone[name] = True
        return name if name is not None and self.alone[name] else None

    def turn(self, name: str | None, joining: list[Job]) -> None:
        """One step of a lane and the first tokens of those that join it. A failure ends its rows, not the server."""
        lane = self.lanes.setdefault(name, Lane(self.model))
        new: list[Job] = []
        try:
            self.leave(lane)
            if lane.rows:
                self.take(list(lane.rows), lane.step())
                self.leave(lane)
            for job in joining:
                job.chooser, job.answer = Chooser(job.sampling), Answer(self.tokenizer, job.stops)
            new = [job for job in joining if not job.cancelled]
            if new:
                rows = [job.row for job in new]
                self.take(rows, lane.join(rows))
                self.leave(lane)
            for job in joining:
                if job.cancelled:
                    self.running.pop(job.row, None)
        except Exception as error:  # out of memory above all: those in flight are told, and the rest goes on
            lost = [row for row in (*lane.rows, *(job.row for job in joining)) if row in self.running]
            del self.lanes[name]
            for row in dict.fromkeys(lost):
                self.running.pop(row).tell(Failed(f"the model failed: {type(error).__name__}"))
            return
        if not lane.rows:
            del self.lanes[name]
            if not self.lanes and state_of(self.model) is not None:
                rearrange(self.model, None).kept.clear()

    def leave(self, lane: Lane) -> None:
        """Rows that are done or that nobody waits for leave."""
        for row in lane.rows:
            if row in self.running and self.running[row].cancelled:
                del self.running[row]
        lane.keep([row for row in lane.rows if row in self.running])

    def take(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose the next token of each row and tell what came of it."""
        for row, one in zip(rows, logits, strict=True):
            job = self.running[row]
            try:
                choice = job.chooser.choose(one)
            except ValueError as error:
                self.finish(row, Failed(str(error)))
                continue
            if choice.token in self.stops:
                self.end(row, "stop")
                continue
            row.last = choice.token
            job.written += 1
            job.unsent.append(choice)
            text = job.answer.add(choice.token)
            full = job.written >= job.max_tokens or len(job.ids) + job.written >= self.room(job.adapter)
            if job.answer.stopped or full:
                self.send(job, text + job.answer.rest())
                self.finish(row, Done("stop" if job.answer.stopped else "length", job.written))
            elif text:
                self.send(job, text)

    def end(self, row: Row, reason: str) -> None:
        """The answer came to its own end."""
        job = self.running[row]
        self.send(job, job.answer.rest())
        self.finish(row, Done(reason, job.written))

    def send(self, job: Job, text: str) -> None:
        """Tell the text that is certain, with the tokens since the last piece."""
        if text or job.unsent:
            self.told(job, Piece(text, tuple(job.unsent)))
            job.unsent.clear()

    def finish(self, row: Row, last: Done | Failed) -> None:
        """The row is free again."""
        self.told(self.running.pop(row), last)

    @staticmethod
    def told(job: Job, event: Any) -> None:
        """Tell the one who asked; one that is gone is no fault."""
        if not job.cancelled:
            job.tell(event)
