"""What was decided and what ran, as plain records and as tables; what a result was made with; graphs as pictures."""
