CREATE TABLE indexes (
	root TEXT NOT NULL,
	data TEXT NOT NULL,
	PRIMARY KEY (root)
)
CREATE TABLE leases (
	name TEXT NOT NULL,
	holder TEXT NOT NULL,
	fence BIGINT NOT NULL,
	expires_s DOUBLE NOT NULL,
	PRIMARY KEY (name)
)
CREATE TABLE meta (
	"key" TEXT NOT NULL,
	value TEXT NOT NULL,
	PRIMARY KEY ("key")
)
CREATE TABLE runs (
	id TEXT NOT NULL,
	name TEXT NOT NULL,
	kind TEXT NOT NULL,
	plan_hash TEXT NOT NULL,
	population TEXT NOT NULL,
	config TEXT NOT NULL,
	provenance TEXT NOT NULL,
	status TEXT NOT NULL,
	created_s DOUBLE NOT NULL,
	finished_s DOUBLE,
	PRIMARY KEY (id)
)
CREATE TABLE commits (
	run_id TEXT NOT NULL,
	version BIGINT NOT NULL,
	follows BIGINT,
	model_root TEXT NOT NULL,
	server_state_root TEXT NOT NULL,
	round BIGINT NOT NULL,
	members BIGINT NOT NULL,
	weight BIGINT NOT NULL,
	created_s DOUBLE NOT NULL,
	final_model_root TEXT,
	final_server_state_root TEXT,
	PRIMARY KEY (run_id, version),
	FOREIGN KEY(run_id, follows) REFERENCES commits (run_id, version),
	CHECK ((version = 0 AND follows IS NULL) OR (version > 0 AND follows IS NOT NULL AND follows = version - 1)),
	FOREIGN KEY(run_id) REFERENCES runs (id),
	FOREIGN KEY(model_root) REFERENCES indexes (root),
	FOREIGN KEY(server_state_root) REFERENCES indexes (root),
	FOREIGN KEY(final_model_root) REFERENCES indexes (root),
	FOREIGN KEY(final_server_state_root) REFERENCES indexes (root)
)
CREATE INDEX commits_by_final_model ON commits (final_model_root)
CREATE INDEX commits_by_final_server_state ON commits (final_server_state_root)
CREATE INDEX commits_by_model ON commits (model_root)
CREATE INDEX commits_by_server_state ON commits (server_state_root)
CREATE TABLE events (
	id INTEGER NOT NULL,
	run_id TEXT NOT NULL,
	time_s DOUBLE NOT NULL,
	kind TEXT NOT NULL,
	data TEXT NOT NULL,
	PRIMARY KEY (id),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE INDEX events_by_run ON events (run_id)
CREATE TABLE ledger (
	id INTEGER NOT NULL,
	population TEXT NOT NULL,
	budget TEXT NOT NULL,
	entry TEXT NOT NULL,
	reservation INTEGER,
	amount DOUBLE NOT NULL,
	run_id TEXT,
	time_s DOUBLE NOT NULL,
	data TEXT NOT NULL,
	PRIMARY KEY (id),
	CHECK (entry IN ('reservation', 'settlement', 'release')),
	FOREIGN KEY(reservation) REFERENCES ledger (id),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE INDEX ledger_by_budget ON ledger (population, budget)
CREATE TABLE metrics (
	id INTEGER NOT NULL,
	run_id TEXT NOT NULL,
	version BIGINT NOT NULL,
	name TEXT NOT NULL,
	value DOUBLE,
	scope TEXT NOT NULL,
	time_s DOUBLE NOT NULL,
	device_class TEXT NOT NULL,
	PRIMARY KEY (id),
	CHECK (scope IN ('server', 'cohort', 'class')),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE INDEX metrics_by_name ON metrics (run_id, name)
CREATE TABLE telemetry (
	id INTEGER NOT NULL,
	run_id TEXT NOT NULL,
	day BIGINT NOT NULL,
	schema TEXT NOT NULL,
	reports BIGINT NOT NULL,
	noise DOUBLE NOT NULL,
	sums TEXT NOT NULL,
	time_s DOUBLE NOT NULL,
	PRIMARY KEY (id),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE INDEX telemetry_by_run ON telemetry (run_id, day)
CREATE TABLE usage (
	id INTEGER NOT NULL,
	run_id TEXT NOT NULL,
	round BIGINT NOT NULL,
	phase TEXT NOT NULL,
	seconds DOUBLE NOT NULL,
	bytes_down BIGINT NOT NULL,
	bytes_up BIGINT NOT NULL,
	joules DOUBLE,
	count BIGINT NOT NULL,
	PRIMARY KEY (id),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE INDEX usage_by_round ON usage (run_id, round)
CREATE TABLE groups (
	run_id TEXT NOT NULL,
	number BIGINT NOT NULL,
	round BIGINT NOT NULL,
	base_version BIGINT NOT NULL,
	members BIGINT NOT NULL,
	weight BIGINT NOT NULL,
	sums_root TEXT NOT NULL,
	version BIGINT,
	PRIMARY KEY (run_id, number),
	FOREIGN KEY(run_id, base_version) REFERENCES commits (run_id, version),
	FOREIGN KEY(run_id, version) REFERENCES commits (run_id, version),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE INDEX groups_by_version ON groups (run_id, version)
CREATE INDEX groups_with_sums ON groups (run_id, base_version) WHERE sums_root != ''
CREATE TABLE rounds (
	run_id TEXT NOT NULL,
	number BIGINT NOT NULL,
	base_version BIGINT NOT NULL,
	state TEXT NOT NULL,
	opened_s DOUBLE NOT NULL,
	closed_s DOUBLE,
	selected BIGINT NOT NULL,
	counted BIGINT NOT NULL,
	released BIGINT NOT NULL,
	reason TEXT NOT NULL,
	configuration TEXT NOT NULL,
	analytics TEXT DEFAULT '{}' NOT NULL,
	PRIMARY KEY (run_id, number),
	FOREIGN KEY(run_id, base_version) REFERENCES commits (run_id, version),
	CHECK (state IN ('open', 'committed', 'abandoned')),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE INDEX rounds_by_state ON rounds (run_id, state)
CREATE TABLE round_logs (
	run_id TEXT NOT NULL,
	round BIGINT NOT NULL,
	data BLOB NOT NULL,
	PRIMARY KEY (run_id, round),
	FOREIGN KEY(run_id, round) REFERENCES rounds (run_id, number),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE TABLE tokens (
	run_id TEXT NOT NULL,
	nonce BLOB NOT NULL,
	state TEXT NOT NULL,
	version BIGINT,
	group_number BIGINT,
	reason TEXT NOT NULL,
	expires_s DOUBLE NOT NULL,
	PRIMARY KEY (run_id, nonce),
	FOREIGN KEY(run_id, version) REFERENCES commits (run_id, version),
	FOREIGN KEY(run_id, group_number) REFERENCES groups (run_id, number),
	CHECK (state IN ('counted', 'refused')),
	FOREIGN KEY(run_id) REFERENCES runs (id)
)
CREATE INDEX tokens_by_expiry ON tokens (run_id, expires_s)
CREATE INDEX tokens_by_group ON tokens (run_id, group_number)
