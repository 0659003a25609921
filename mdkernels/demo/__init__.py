"""The whole method on real text, with nothing to download: `mdkernels demo`."""
