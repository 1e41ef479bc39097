"""What reads finished runs: their numbers, comparisons, findings, and pages to look at. Torch is not imported but for pictures."""
