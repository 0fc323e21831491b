"""How questions are answered: trials, paired results, figures, the page."""
