"""Says what a mesh can detect and how it responds: below the table at the start, and in warnings where that is little."""

from __future__ import annotations

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.majority import most_bans, strikes_to_ban

__all__ = ["protection", "shortcoming"]


def protection(mesh: Mesh, verification: Verification | None, response: Response) -> str:
    """Say what is verified, and how the run responds.

    Example:
        >>> protection(Mesh(stages=2, replicas=2), Verification(), Response(audit_rate=None))
        'Verified: what crosses a boundary. Flags decide: what is flagged stays out of the weights; a worker flagged in 5 steps in \
a row, and not only as others of its stage are, is banned, at most 1 of 2 of a stage.'
    """
    if verification is None:
        return "Nothing is verified."
    if mesh.stages == 1:
        return "Nothing is verified: with one stage nothing crosses a boundary."
    rate = response.audit_rate_of(mesh)
    if rate is None:
        return f"Verified: what crosses a boundary. Flags decide: {_by_flags(mesh, response)}."
    audited = f"Audited: what is flagged, and {100 * rate:g} % of all signals, by another worker of the stage"
    return f"Verified: what crosses a boundary. {audited}. What does not match {_by_audits(mesh, response)}."


def _by_flags(mesh: Mesh, response: Response) -> str:
    if response.on_flag == "log":
        return "what is flagged is reported"
    if response.ban_after is None or mesh.replicas == 1:
        return "what is flagged stays out of the weights; nobody is banned"
    most = most_bans(mesh.replicas)
    return (
        f"what is flagged stays out of the weights; a worker flagged in {response.ban_after} steps in a row, and not only"
        f" as others of its stage are, is banned, at most {most} of {mesh.replicas} of a stage"
    )


def _by_audits(mesh: Mesh, response: Response) -> str:
    if response.on_flag == "log":
        return "is reported"
    strikes = strikes_to_ban(mesh.replicas)
    if strikes is None:
        return "has the step done again without its sender; of two nobody can tell who lies, so nobody is banned"
    if response.ban_after is None:
        return "for most of the stage has the step done again without its sender; nobody is banned"
    when = "at once" if strikes == 1 else "the second time"
    most = most_bans(mesh.replicas)
    return (
        f"for most of the stage has the step done again without its sender, who is banned {when}, at most {most} of {mesh.replicas}"
        " of a stage"
    )


def shortcoming(mesh: Mesh, verification: Verification | None, response: Response) -> str | None:
    """Say why a mesh is hardly protected although protection was asked for, and the remedy; ``None`` if it is protected.

    Example:
        >>> print(shortcoming(Mesh(stages=4, replicas=1), Verification(), Response(audit_rate=None)))
        None
    """
    if verification is None:
        return None
    if mesh.stages == 1:
        return (
            f"With stages=1 nothing crosses a boundary between workers, so that nothing is verified on this mesh of 1 x"
            f" {mesh.replicas}. Use at least two stages, which takes Trainer(devices=2) or more, or say verification=None."
        )
    if mesh.replicas == 1 and response.audit_rate is not None:
        return (
            f"With replicas=1 there is nobody who could recompute a signal on this mesh of {mesh.stages} x 1: flags alone decide,"
            " what no feature shows is not found, and nobody can be banned. Use replicas=2 or more (with 3 or more a liar can be"
            " told from an accuser), or say Response(audit_rate=None)."
        )
    return None
