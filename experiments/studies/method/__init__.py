"""How a question is answered: trials, paired results, figures, the page."""
