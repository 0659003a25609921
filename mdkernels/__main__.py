"""`python -m mdkernels` is `mdkernels`."""

from .cli import main

raise SystemExit(main())
