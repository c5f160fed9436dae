# SPDX-License-Identifier: MIT
"""Domains, accounts and aliases as the server asks for them: from memory where possible, never wrong for long.

Guarantees: what is cached is dropped when the generation in the database has moved, which is looked at every
`poll_seconds`, so that a change by anybody shows within a second; a database that does not answer is Unavailable, never
"unknown", and after `stale_seconds` of silence the caches are not believed any more (`generation` is -1 then); all
caches are bounded, those of "no such address" as well; foreign addresses cost one entry for each domain.
What addresses mean is in `store/addresses.py`; changes are in `store/directory_admin.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, TypeVar

from attrs import frozen
from sqlalchemy import Connection
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.store.addresses import (
    FOREIGN,
    AddressReader,
    AddressSettings,
    Name,
    login_name,
    name_of,
    read_generation,
)
from polarismail.store.interfaces import Account, IDirectory, Resolution
from polarismail.store.lookups import Lookups
from polarismail.store.lru import LruCache
from polarismail.values.address import Mailbox
from polarismail.values.errors import Unavailable

T = TypeVar("T")


@frozen
class DirectorySettings(AddressSettings):
    """How addresses are read, and how much is remembered for how long."""

    cache_entries: int = 50_000  # addresses; as many login names, account numbers and foreign domains
    poll_seconds: float = 0.5
    stale_seconds: float = 10.0


@frozen
class _Address:
    """The question: what does this address mean?"""

    name: Name


@frozen
class _Login:
    """The question: which active account is called this?"""

    name: Name


_Question = _Address | _Login | int  # an int: which account has this number?
_Answer = Resolution | Account | None


@implementer(IDirectory)
class Directory:
    """See the module. Works from `start` on; before, it answers from the database each time."""

    log = Logger()

    def __init__(self, database: Any, reactor: Any, settings: DirectorySettings | None = None) -> None:
        self.settings = settings or DirectorySettings()
        self.generation = -1
        self._database, self._reactor = database, reactor
        entries = self.settings.cache_entries
        self._resolutions: LruCache[tuple[str, str], Resolution] = LruCache(entries)
        self._foreign: LruCache[str, Resolution] = LruCache(entries)
        # One-tuples, because a cache holds no None, and "no such account" is worth remembering.
        self._accounts: LruCache[Name | int, tuple[Account | None]] = LruCache(entries)
        self._lookups: Lookups[_Question, _Answer] = Lookups(self._fetch, reactor)
        self._poll = LoopingCall(self._do_poll)
        self._poll.clock = reactor
        self._trusted = False
        self._answered = 0.0

    def start(self) -> Deferred[None]:
        """Begin to watch for changes; fires when the caches may be used, or the first look has failed."""
        first: Deferred[None] = Deferred()
        self._poll.start(self.settings.poll_seconds, now=False).addErrback(self._poll_failed)
        self._do_poll().addCallback(lambda _: first.callback(None))
        return first

    def stop(self) -> None:
        """Watch no more. Idempotent."""
        if self._poll.running:
            self._poll.stop()
        self._distrust()

    # -- IDirectory --------------------------------------------------------------------------------------------------

    def resolve(self, mailbox: Mailbox) -> Resolution | Deferred[Resolution]:
        """What the address means: from the cache at once, else from the database. Fails with Unavailable."""
        if self._trusted:
            # The hot path: no object is made but the key.
            found = self._resolutions.get((mailbox.local, mailbox.domain)) or self._foreign.get(mailbox.domain)
            if found is not None:
                return found
        name = name_of(mailbox)
        if name is None:
            return FOREIGN
        if self._trusted:
            found = self._resolutions.get((name.local, name.domain)) or self._foreign.get(name.domain)
            if found is not None:
                return found
        answer: Deferred[Any] = self._lookups.ask(_Address(name))
        return answer

    def find_account(self, name: str) -> Deferred[Account | None]:
        """The active account with this login name. Fails with Unavailable."""
        wanted = login_name(name)
        if wanted is None:
            return succeed(None)
        if self._trusted:
            known = self._accounts.get(wanted)
            if known is not None:
                return succeed(known[0])
        answer: Deferred[Any] = self._lookups.ask(_Login(wanted))
        return answer

    def account_by_id(self, account_id: int) -> Account | Deferred[Account | None] | None:
        """The account with this number, switched off or not; None where it was removed. Fails with Unavailable."""
        if self._trusted:
            known = self._accounts.get(account_id)
            if known is not None:
                return known[0]
        answer: Deferred[Any] = self._lookups.ask(account_id)
        return answer

    # -- changes -----------------------------------------------------------------------------------------------------

    def change(self, job: Callable[[Connection], T]) -> Deferred[T]:
        """Run one of the changes of `store/directory_admin.py`; when this fires it is on stable storage and this
        process sees it. Fails with AccountError and Unavailable."""
        changed: Deferred[T] = self._database.write(job)
        return changed.addCallback(lambda result: self.refresh().addCallback(lambda _: result))

    def refresh(self) -> Deferred[None]:
        """Look at the generation now: what was changed before this call is seen when it has fired. Never fails."""
        return self._do_poll()

    def statistics(self) -> dict[str, int]:
        """How full the caches are and what they cost."""
        return {
            "generation": self.generation,
            "addresses": len(self._resolutions),
            "accounts": len(self._accounts),
            "foreign_domains": len(self._foreign),
            "reads": self._lookups.reads,
            "refused": self._lookups.refused,
        }

    def _do_poll(self) -> Deferred[None]:
        try:
            looked: Deferred[int] = self._database.read(read_generation)
        except Exception:
            looked = fail(Failure())
        # A database that hangs counts as one that fails.
        looked.addTimeout(self.settings.stale_seconds, self._reactor)
        return looked.addCallbacks(self._saw, self._missed).addErrback(self._poll_failed)

    def _saw(self, generation: int) -> None:
        if generation > self.generation:  # two looks may answer out of order
            self._forget()
            self.generation = generation
        self._answered = monotonic()
        self._trusted = True

    def _missed(self, failure: Failure) -> None:
        if self._trusted and monotonic() - self._answered >= self.settings.stale_seconds:
            self.log.error("the directory's database does not answer: {problem}", problem=failure.getErrorMessage())
            self._distrust()

    def _distrust(self) -> None:
        # Without a generation, others who compare it (the verified logins) ask as well.
        self._trusted, self.generation = False, -1

    def _poll_failed(self, failure: Failure) -> None:
        self.log.failure("watching the directory failed", failure)

    def clear_caches(self) -> None:
        """Give up the memory of it: the database has it all."""
        self._resolutions.clear()
        self._foreign.clear()
        self._accounts.clear()

    def _forget(self) -> None:
        self.clear_caches()
        self._lookups.forget_running()

    # -- look-ups ----------------------------------------------------------------------------------------------------

    def _fetch(self, questions: Sequence[_Question]) -> Deferred[dict[_Question, _Answer | Unavailable]]:
        settings = self.settings

        def job(connection: Connection) -> tuple[int, dict[_Question, _Answer | Unavailable]]:
            # The generation first: what is read after it is at least as new, on databases without a snapshot too.
            generation = read_generation(connection)
            return generation, _read_answers(AddressReader(connection, settings), questions)

        fetched: Deferred[tuple[int, dict[_Question, _Answer | Unavailable]]] = self._database.read(job)
        return fetched.addCallback(self._learn)

    def _learn(
        self, read: tuple[int, dict[_Question, _Answer | Unavailable]]
    ) -> dict[_Question, _Answer | Unavailable]:
        generation, answers = read
        if generation > self.generation:
            self._forget()
            self.generation = generation
        if generation == self.generation:
            for question, answer in answers.items():
                if isinstance(answer, Unavailable):
                    self.log.error("{problem}", problem=str(answer))
                elif isinstance(question, _Address):
                    assert isinstance(answer, Resolution)
                    name = question.name
                    if answer.ours:
                        self._resolutions.put((name.local, name.domain), answer)
                    else:
                        self._foreign.put(name.domain, answer)
                else:
                    assert answer is None or isinstance(answer, Account)
                    self._accounts.put(question if isinstance(question, int) else question.name, (answer,))
        return answers


def _read_answers(reader: AddressReader, questions: Sequence[_Question]) -> dict[_Question, _Answer | Unavailable]:
    answers: dict[_Question, _Answer | Unavailable] = {}
    reader.load(q.name for q in questions if not isinstance(q, int) and q.name.domain)
    ids = [q for q in questions if isinstance(q, int)]
    by_id = reader.accounts_by_id(ids) if ids else {}
    for question in questions:
        try:
            if isinstance(question, int):
                answers[question] = by_id.get(question)
            elif isinstance(question, _Login):
                answers[question] = reader.login(question.name)
            else:
                answers[question] = reader.resolve(question.name)
        except Unavailable as problem:
            answers[question] = problem
    return answers
