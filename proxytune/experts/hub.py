"""Experts on the Hugging Face hub: one repository an expert, its files beside its manifest and a card made from it.

A commit of the hub pins the manifest and the manifest pins every file by its hash, so what is pulled at a commit is
what was pushed or is refused. Requests go to HF_ENDPOINT, with the token that `hf auth login` or HF_TOKEN keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import RegistryError
from proxytune.experts import intake
from proxytune.experts.card import card
from proxytune.experts.manifest import FILENAME, Manifest
from proxytune.experts.registry import Expert, Registry, check_name
from proxytune.models.online import answers

CARD = "README.md"
KEPT = (".gitattributes",)  # the hub's own


def push(registry: Registry, expert: Expert, repo: str, tags: Sequence[str] = (), *, public: bool = False) -> str:
    """Make the repository hold this expert and nothing else, in one commit, and return the commit.

    The commit is tagged v<N> and `tags`, which move. A repository that this makes is private unless `public`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    for name in expert.manifest.files:
        intake.check_name(name, expert.reference)
    registry.verify(expert)
    sources: dict[str, Path | bytes] = {CARD: card(expert, repo).encode(), FILENAME: expert.folder / FILENAME}
    sources |= {name: expert.folder / name for name in expert.manifest.files}
    with _told(repo):
        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        stale = [file.rfilename for file in api.model_info(repo).siblings or []]
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, source) for name, source in sources.items()),
                *(CommitOperationDelete(name) for name in stale if name not in sources and name not in KEPT),
            ],
            commit_message=expert.reference,
        )
        there = {tag.name for tag in api.list_repo_refs(repo).tags}
        for tag in (f"v{expert.version}", *tags):
            if tag in there:
                api.delete_tag(repo, tag=tag)
            api.create_tag(repo, tag=tag, revision=done.oid)
    return done.oid


def pull(registry: Registry, repo: str, revision: str | None = None, name: str | None = None) -> Expert:
    """Register the expert in a repository as the next version of its name (or of `name`), everything checked first.

    revision: a commit, a tag or a branch; the commit that it means is kept in the manifest. Files come through the
    hub's cache, so a pull that was cut goes on.
    """
    from huggingface_hub import HfApi

    if name is not None:
        check_name(name)
    with _told(repo):
        api = HfApi()
        found = api.model_info(repo, revision=revision, files_metadata=True)
        commit = found.sha
        assert commit is not None, "the hub names the commit of what it lists"
        where = f"{repo} at {commit[:12]}"
        sizes = {file.rfilename: file.size for file in found.siblings or []}
        if not 0 < (sizes.get(FILENAME) or 0) <= intake.MANIFEST_BYTES:
            raise intake.refused(where, f"it has no {FILENAME} of up to {intake.MANIFEST_BYTES:,} bytes")
        raw = Path(api.hf_hub_download(repo, FILENAME, revision=commit)).read_bytes()
        manifest = intake.read_manifest(raw, where)
        _check_sizes(manifest, sizes, where)
        if there := intake.taken_before(registry, manifest, raw, name):
            return there
        intake.check_room(manifest, registry.root)
        with registry.staging() as folder:
            taken = intake.Intake(folder, manifest, where)
            for file in manifest.files:
                with open(api.hf_hub_download(repo, file, revision=commit), "rb") as content:
                    taken.take(file, content)
            taken.finish()
            return registry.publish(folder, intake.arrived(manifest, raw, f"hub:{repo}", commit, name))


def _check_sizes(manifest: Manifest, sizes: Mapping[str, Any], where: str) -> None:
    """Before anything large is fetched."""
    for name, entry in manifest.files.items():
        if name not in sizes:
            raise intake.refused(where, f"{name} is missing")
        if sizes[name] != entry.size:
            raise intake.refused(where, f"{name} has {sizes[name]:,} bytes, not the {entry.size:,} of its manifest")


@contextlib.contextmanager
def _told(repo: str) -> Generator[None]:
    """What the hub's client raises, in one line."""
    from huggingface_hub import constants, errors

    if not constants.is_offline_mode() and not answers(constants.ENDPOINT):
        raise RegistryError(f"{constants.ENDPOINT} does not answer", "go online; export and import need no hub")
    login = "log in with `hf auth login`, or check the name and the token's rights"
    try:
        yield
    except errors.HFValidationError as error:
        raise RegistryError(f"hub={repo}: {error}", "give it as organisation/name") from error
    except errors.OfflineModeIsEnabled as error:
        raise RegistryError(f"cannot reach the hub for {repo}: offline mode is on", "unset HF_HUB_OFFLINE") from error
    except errors.RevisionNotFoundError as error:
        raise RegistryError(f"{repo} has no such revision", "see its commits and tags on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise RegistryError(f"{constants.ENDPOINT} shows no {repo}", login) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = login if status in (401, 403) else "try again later; nothing is half done here"
        raise RegistryError(f"{constants.ENDPOINT} refused it for {repo}: HTTP {status}", hint) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, RuntimeError) as error:  # the last: a large file's upload
        raise RegistryError(f"lost {constants.ENDPOINT} on the way to {repo}: {error}", "run it again") from error
