"""The paper's tables and figures: what a scale stands for, the plan, its steps, the results page."""
