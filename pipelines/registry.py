"""List, show, tag, remove, export, import, push and pull registered experts.

  proxytune registry list
  proxytune registry show code@latest
  proxytune registry export code@best code.tar             import code.tar registers it elsewhere
  proxytune registry push code@best hub=my-org/code-expert
  proxytune registry pull hub=my-org/code-expert revision=COMMIT

An expert's manifest says what it came from, what it was tuned on, and how well it did.
"""

from __future__ import annotations

import sys

from pipelines import cli


def main(arguments: list[str]) -> int:
    from proxytune.stages import registry

    return registry.main(arguments)


if __name__ == "__main__":
    sys.exit(cli.main(["registry", *sys.argv[1:]]))
