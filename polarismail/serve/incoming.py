# SPDX-License-Identifier: MIT
"""The draft of a message that comes from outside: its header section is looked at before an octet of it is kept.

Guarantees: what is stored never holds a field that only we may write (HOSTILE section 4), however the content was sliced and
wherever it is stored; a content without such fields passes untouched, and from the end of its header section on costs one
call more for each piece. At most one header section and one piece are held back.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred
from zope.interface import implementer

from polarismail.message.headers import MAX_SECTION_OCTETS
from polarismail.message.inspection import HeaderCollector, Inspection, inspect, remove_claims
from polarismail.store.interfaces import IDraft


@implementer(IDraft)
class IncomingDraft:
    """See the module. `draft` is the spool's. `final`: the message goes no further than here, or begins here, so that a
    Return-Path that it brought goes (RFC 5321 §4.4)."""

    def __init__(self, draft: IDraft, hostname: str, final: bool) -> None:
        self.draft = draft
        self.queue_id: str = draft.queue_id
        self.section = b""  # what is kept of the header section
        self.removed = 0  # fields that were taken out
        self._inspection: Inspection | None = None
        self._collector: HeaderCollector | None = None
        self._hostname, self._final = hostname, final

    @property
    def size(self) -> int:
        """IDraft."""
        return self.draft.size  # type: ignore[no-any-return]  # an Attribute of the interface

    @property
    def trace(self) -> bytes:
        """IDraft."""
        return self.draft.trace  # type: ignore[no-any-return]  # an Attribute of the interface

    def write(self, octets: bytes) -> Deferred[None] | None:
        """IDraft."""
        if self._inspection is not None:
            return self.draft.write(octets)
        collector = self._collector
        if collector is None:
            end = octets.find(b"\r\n\r\n") + 2
            if 2 < end <= MAX_SECTION_OCTETS and octets[:2] != b"\r\n":
                # Nearly always: the whole header section is in the first piece.
                return self.draft.write(octets if self._look(octets[:end]) else self.section + octets[end:])
            collector = self._collector = HeaderCollector()
        if not collector.receive(octets):
            return None
        return self._pass_on(collector)

    def inspection(self) -> Inspection:
        """What the header section is like. Call it at the end of the content: a section without an end has ended then."""
        if self._inspection is None:
            collector = self._collector or HeaderCollector()
            collector.finish()
            waits = self._pass_on(collector)
            if waits is not None:
                waits.addErrback(_is_told_again)
        assert self._inspection is not None
        return self._inspection

    def head(self, octets: int) -> bytes:
        """IDraft."""
        return self.draft.head(octets)

    def abandon(self) -> None:
        """IDraft."""
        self._collector = None
        self.draft.abandon()

    def _pass_on(self, collector: HeaderCollector) -> Deferred[None] | None:
        self._look(collector.section)
        rest, self._collector = collector.rest, None
        kept = self.section + rest
        return self.draft.write(kept) if kept else None

    def _look(self, section: bytes) -> bool:
        """Whether the section may stay as it is."""
        found = self._inspection = inspect(section)
        if found.claims:
            section, self.removed = remove_claims(section, self._hostname, final=self._final)
        self.section = section
        return not self.removed


def _is_told_again(_: object) -> None:
    """A draft that could not be written fails its commit, too."""
