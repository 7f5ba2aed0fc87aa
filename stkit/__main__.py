"""``python -m stkit``, and so ``accelerate launch -m stkit``: the ``stkit`` command."""

from .cli import main

if __name__ == "__main__":
    main()
