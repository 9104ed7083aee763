"""What a report shows: exhibits from results, and the page that holds them."""
