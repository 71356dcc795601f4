"""What an optimizer is made of, anew when a group is added; and its state, saved, loaded and copied."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvadion.options import Options, asks_for_local_steps, check_decay, check_group, check_rule
from curvadion.rooms import Rooms
from curvadion.rules import Step
from curvadion.sharding.agreement import Agreement
from curvadion.sharding.group import Group
from curvadion.sharding.layout import reshard_gathered_modules
from curvadion.sharding.lost import take_word_back
from curvadion.state.checkpoint import load
from curvadion.state.common import holding, without_own
from curvadion.state.cycled import CycledMomentum
from curvadion.state.loadable import intact
from curvadion.state.store import copy_into
from curvadion.view import View

logger = logging.getLogger("curvadion.optimizer")

COMMON = "common_state()"


class Stateful(View):
    """An optimizer of rooms whose state can be saved, loaded and copied. Communicates in `_settle` alone."""

    # What a copy carries over; the rooms are built anew.
    _CARRIED = ("_options", "_schedule", "_gate", "_trouble", "_agreement", "_consensus")
    _options: Options
    _peers: Group | None
    _agreement: Agreement
    _cycled: CycledMomentum
    _agreed = False  # on whether all ranks can load what they are loading

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the next step is synchronized. With consensus="outer", right after `synchronize()`."""
        self._refuse_inside("add_param_group()")
        built = self._rooms is not None
        if built and self._consensus.under_way:
            elastic = self._peers is not None and self._peers.elastic
            raise RuntimeError(
                f"with consensus={self._options.consensus!r} a group must be added when nothing is under way "
                "between replicas; a step was taken since; "
                + (
                    "replicas of an ElasticGroup cannot synchronize(): save inside opt.common_state(), end "
                    "all of them, start them again, load, and add it before join()"
                    if elastic
                    else "call opt.synchronize() on every rank first"
                )
            )
        if isinstance(param_group, dict):  # torch refuses anything else
            check_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_decay(group)
            check_rule(group, self._options.defaults, self._consensus)
            if built:
                self._build()
                self._schedule.forced = self._agreement.pending = True
        except Exception:
            self.param_groups.pop()
            if built:
                self._build()
            raise

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; never communicates.

        One replica settles first what its outer steps have under way. Inside `common_state()` it is what all
        replicas can go on from. Raises RuntimeError elsewhere if there are several replicas and they may
        differ.
        """
        self._cycled.follow(self.param_groups)
        if self._inside == COMMON:
            return self._common_state_dict()
        elastic = self._peers is not None and self._peers.elastic
        if self.diverged and self.replicas == 1 and not elastic:  # with nobody to wait for
            self._built.store.settle()
            self._settle(self._built.step(self.param_groups, self._schedule))
        if self.diverged:
            raise RuntimeError(
                f"the state of {self.replicas} replicas must be equal to be saved (a checkpoint would be a "
                "patchwork, and lack what is under way with consensus='outer'); a step was taken since; call "
                "opt.synchronize() on every rank before saving, or save inside opt.common_state(); or call "
                "opt.discard_divergence() before loading"
            )
        return super().state_dict()

    @property
    def keeps_common_state(self) -> bool:
        """Whether `common_state()` may be entered between any two steps; else only right after a synchronized
        one, if at all."""
        never_apart = self._schedule.options.max_local_steps == 0 and not self._consensus.leaves_apart
        return self.replicas == 1 or self._consensus.keeps_parameters or never_apart

    @contextmanager
    def common_state(self) -> Iterator[None]:
        """Hold in the parameters what all replicas were equal in last; the run goes on as if nothing was.

            with opt.common_state():
                model_state, opt_state = get_state_dict(model, opt)
                state = {"model": model_state, "optimizer": opt_state}
                future = dcp.async_save(state, checkpoint_id=folder, process_group=gloo)

        For checkpoints without `synchronize()`: bitwise the same whatever replica loads them. Inside,
        `state_dict()` is the outer momenta, the counters and, on the first replica alone, its own momenta and
        moments, with which all go on; so save with torch.distributed.checkpoint, which puts together what
        ranks have, or the files of the first replica. Lost after a load are the local steps since X_0, at
        most max_local_steps + outer_delay, and what rounding has kept back; with fragments the steps
        since each one's turn. Leave it when the values have been copied, as they have when async_save returns
        without a stager of your own. No communication; costs the memory of the largest parameter.

        Raises:
            RuntimeError: on every rank, where replicas have left what was common and nobody has kept it, as
                on local steps of consensus="average"; or after a step that raised.
        """
        self._refuse_inside(COMMON)
        self._trouble.refuse_if_broken()
        with torch.no_grad():
            X, common = self._built.X(), self._common_parameters()
        self._inside = COMMON
        try:
            with holding(X, common):
                if self._built.table.device.type not in (
                    "cpu",
                    "meta",
                ):  # others read on streams of their own
                    torch.accelerator.current_stream(self._built.table.device).synchronize()
                yield
        finally:
            self._inside = ""

    def _common_parameters(self) -> Sequence[Tensor]:
        """Return the parameters when replicas were equal last. Raises RuntimeError where nobody has kept
        them."""
        built = self._built
        X_0 = self._consensus.common(built.store).get("X_0")
        if X_0 is None and self._parameters_differ:
            raise RuntimeError(
                f"consensus={self._options.consensus!r} keeps no parameters that all replicas share while "
                f"they take local steps; {self._schedule.local_steps} were taken since a synchronized one; "
                "save right after a synchronized step (curvadion/synchronized in opt.metrics()), call "
                "opt.synchronize() first, or use consensus='outer'"
            )
        return built.X() if X_0 is None else X_0

    def _common_state_dict(self) -> dict[str, Any]:
        state, table = super().state_dict(), self._built.table
        first = self._peers is None or self._peers.rank == 0
        chosen = without_own(self.state, self._built.store, first=first)
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        number_of = dict(zip(table.listed, numbers, strict=True))
        return {**state, "state": {number_of[p]: chosen[p] for p in table.params}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the existing state, whose dtypes and memory are kept. Every rank calls it.

        Groups take the saved options, as in torch. Raises ValueError on every rank, before any change, if it
        does not fit on some rank.
        """
        self._refuse_inside("load_state_dict()")
        store = self._built.store
        store.settle()
        own = self.__dict__["state"]
        try:
            calls = self._agree, store.start_right_factors, self._start_afresh
            load(self, store.table, own, super().load_state_dict, state_dict, *calls)
        except Exception:
            self._refuse_steps(self._spoiled())
            raise

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load a checkpoint inside on all ranks, or on none: one that fails before it comes to
        `load_state_dict()`, at the model for example, lets that of the others raise. Every rank enters it."""
        self._agreed = False
        try:
            yield
        except BaseException as error:
            if not self._agreed and not isinstance(error, KeyboardInterrupt | SystemExit):
                self._agree(error, 0)
            raise
        if not self._agreed:  # nothing was loaded here
            self._agree(None, 0)

    def _agree(self, failure: BaseException | None, steps: int) -> None:
        self._agreed = True
        self._now_in("load_state_dict()")
        refusal, spoiled = self._agreement.refusal(self._built.exchange, failure, steps, self._spoiled)
        if refusal is not None:  # all ranks refuse, and are to go on or not as one
            self._refuse_steps(spoiled)
            raise refusal

    def _spoiled(self) -> bool:
        """Whether the state on this rank is not what a step leaves; a dry run's has no values."""
        if self._built.table.dry:
            return False
        as_counted = self._built.store.counts_as(self._schedule)
        return not (as_counted and intact(self.__dict__["state"].values()))

    def _refuse_steps(self, spoiled: bool) -> None:
        if spoiled:
            self._trouble.broken = (
                "a checkpoint that was refused had been read into the optimizer's own state, as "
                "torch.distributed.checkpoint reads, on this rank or another; load another one before the "
                "next step()"
            )

    @property
    def _built(self) -> Rooms:
        if self._agreement.pending and not self._schedule.diverged:  # all ranks compare what they find
            self._follow_replacements()
        return super()._built

    def _follow_replacements(self) -> None:
        """Take the tensors that a host has put in place of the parameters, as Accelerate does, which shards a
        model when its optimizer is there already. No step has been taken with those before."""
        rooms, states = super()._built, self.__dict__["state"]
        instead = rooms.table.replacements(self.param_groups)
        if not instead:
            return
        self.__dict__["state"] = defaultdict(dict, {instead[p]: state for p, state in states.items()})
        try:
            self._build()
        except Exception:
            self._rooms, self.__dict__["state"] = rooms, states
            raise
        self._forget_ways()
        logger.info(
            "somebody has put other tensors of the same shapes in place of %d parameters, before a step was "
            "taken with those: they are laid out anew, by the same names",
            len(instead),
        )

    @property
    def _alone(self) -> bool:
        return self.replicas == 1 and not asks_for_local_steps(self.param_groups, self._options)

    def _follow_requires_grad(self) -> None:
        """Leave what has been frozen alone from now on, without its state, and take up what is trained again.
        Replicas are equal."""
        table = self._built.table
        if not table.outdated:
            return
        self._build()
        for p in self._built.table.frozen:
            self.__dict__["state"].pop(p, None)
        self._schedule.forced = self._agreement.pending = True

    def _start_afresh(self) -> None:
        """Go on from the state that was loaded: replicas are equal, and nothing is under way."""
        self._built.store.loaded(self._schedule)
        self._consensus.forget()
        self._gate.forget()
        self._trouble.reset()
        self._cycled.forget()
        self._cycled.follow(self.param_groups)
        self._agreement.pending = True
        self._schedule.diverged = self._schedule.forced = self._schedule.wanted = False

    def __getstate__(self) -> dict[str, Any]:
        if self._peers is not None or self._built.table.shards.mesh is not None:
            raise TypeError(
                "a CurvaDion on a mesh or process group cannot be copied or pickled; save opt.state_dict() "
                "instead"
            )
        if self._inside == COMMON:
            raise RuntimeError(
                f"an optimizer must not be copied or pickled inside {COMMON}, where parameters and what they "
                "are put back to have changed places; leave it first, or save opt.state_dict()"
            )
        self._cycled.follow(self.param_groups)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._CARRIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_options" in state:  # a copy; torch's load_state_dict comes through here as well
            self._peers, self._inside, self._cycled = None, "", CycledMomentum()
            self._schedule.diverged = self._gate.awaits_answer or self._consensus.under_way
            self._build()

    @torch.no_grad()
    def _build(self) -> None:
        """Lay out all parameters and (re)allocate state, keeping the values of state that exists."""
        if self._rooms is not None:
            self._rooms.store.settle()
        self._rooms = rooms = Rooms.of(
            self.param_groups,
            self._options,
            self._peers,
            uses_Q=self._consensus.uses_Q,
            outer_momentum=self._consensus.keeps_momentum,
            before=self.__dict__["state"],
            earlier=self._rooms,
        )
        self._cycled.follow(self.param_groups)
        self._consensus.allocate(rooms.X())
        self._gate.attach(rooms.step(self.param_groups, self._schedule))
        self.__dict__["state"].update(rooms.store.states)

    # ---- replicas become equal

    @property
    def _parameters_differ(self) -> bool:
        apart = self._schedule.apart or (self.diverged and self._consensus.leaves_apart)
        return self.replicas > 1 and apart

    def _settle(self, step: Step) -> None:
        store, exchange = self._built.store, self._built.exchange
        self._gate.last_answer()
        if self.diverged:
            frozen = [x for x, p in zip(step.X, self._built.table.params, strict=True) if not p.requires_grad]
            still = [x.clone() for x in frozen]
            self._consensus.settle(step)
            copy_into(frozen, still)  # what arrived, or was kept back, does not move what is frozen by now
            if self.replicas > 1:
                average = self._parameters_differ or self._consensus.keeps_own_gradients
                store.make_common(step.X, exchange, average=average)
                store.average_momentum(self._built.ops, exchange)
            reshard_gathered_modules()
        self._forget_ways()
        self._schedule.local_steps, self._schedule.diverged = 0, False
        store.write_counters(self._schedule)

    def _forget_ways(self) -> None:
        """Let the rooms start anew, because replicas are equal."""
        self._consensus.forget()
        self._gate.signal.forget()

    def _now_in(self, call: str) -> None:
        take_word_back()
        place = self._built.exchange.place
        place.call, place.steps = call, self._schedule.steps

    def _refuse_inside(self, call: str) -> None:
        if self._inside:
            raise RuntimeError(
                f"{call} must not be called inside {self._inside}, which puts parameters back; leave it first"
            )
