//! What stands in the VPC: Debian's nginx, PostgreSQL and iperf3, as a user's would.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use lab::site::SERVER;
use lab::{Cmd, Host, Process, http};

const SOON: Duration = Duration::from_secs(15);
const PASSWORD: &str = "demo";

/// The page that nginx serves at `/`.
pub(crate) const PAGE: &str = "a page from the VPC\n";
/// The name of the big file that it serves too.
pub(crate) const FILE: &str = "64MiB";
/// Its size in bytes.
pub(crate) const FILE_SIZE: usize = 64 << 20;

/// The running servers.
pub(crate) struct Services {
    pub(crate) web_version: String,
    pub(crate) database_version: String,
    /// SHA-256 of the big file, in hex.
    pub(crate) digest: String,
    _processes: [Process; 3],
}

impl Services {
    pub(crate) fn start(server: &Host) -> anyhow::Result<Self> {
        let (web, digest) = web(server).context("nginx")?;
        let database = database(server).context("PostgreSQL")?;
        let iperf = server.spawn("iperf3", server.command(["iperf3", "--server"]))?;
        let mut processes = [web, database, iperf];
        for (process, port) in processes.iter_mut().zip([80, 5432, 5201]) {
            let at = SocketAddr::new(SERVER[0], port);
            process.ready(SOON, &format!("port {port} to open"), || {
                server.tcp_connect(at, SOON).is_ok()
            })?;
        }
        Ok(Self {
            // nginx tells its version on standard error: "nginx version: nginx/1.22.1".
            web_version: last_word(&Cmd::new(["nginx", "-v"]).output()?.stderr),
            database_version: Cmd::new(["postgres", "--version"])
                .run()?
                .split(' ')
                .nth(2)
                .unwrap_or_default()
                .trim()
                .to_owned(),
            digest,
            _processes: processes,
        })
    }
}

fn last_word(text: &str) -> String {
    let word = text.trim().rsplit([' ', '/']).next();
    word.unwrap_or_default().to_owned()
}

fn web(server: &Host) -> anyhow::Result<(Process, String)> {
    let folder = server.folder().join("web");
    let pages = folder.join("pages");
    fs::create_dir_all(&pages)?;
    fs::write(pages.join("index.html"), PAGE)?;
    let file = pages.join(FILE);
    fs::write(&file, http::pattern(FILE_SIZE))?;
    let sum = Cmd::new(["sha256sum".as_ref(), file.as_os_str()]).run()?;
    let config = folder.join("nginx.conf");
    fs::write(
        &config,
        format!(
            "worker_processes 1;\n\
             pid {folder}/nginx.pid;\n\
             events {{}}\n\
             http {{\n\
               access_log off;\n\
               client_body_temp_path {folder}/body;\n\
               sendfile on;\n\
               server {{ listen 80; listen [::]:80; root {folder}/pages; }}\n\
             }}\n",
            folder = folder.display()
        ),
    )?;
    let command = server
        .command(["nginx", "-e", "stderr", "-g", "daemon off;", "-c"])
        .arg(config);
    let digest = sum.split(' ').next().unwrap_or_default().to_owned();
    Ok((server.spawn("nginx", command)?, digest))
}

/// A throw-away cluster, run by an unprivileged user, for PostgreSQL refuses root.
fn database(server: &Host) -> anyhow::Result<Process> {
    let (uid, gid) = user("postgres").or_else(|_| user("nobody"))?;
    let folder = server.folder().join("database");
    let password = server.folder().join("database.password");
    fs::create_dir(&folder)?;
    fs::write(&password, PASSWORD)?;
    for path in [&folder, &password] {
        chown(path, Some(uid), Some(gid))?;
    }
    let as_user = |argv: &[&str]| {
        let command = server.command(argv).user(uid, gid).folder(&folder);
        command.env("LC_ALL", "C.UTF-8")
    };
    let data = path(&folder)?;
    as_user(&["initdb", "--no-sync", "--encoding=UTF8", "--username=demo"])
        .args(["--auth=scram-sha-256", "--pwfile", path(&password)?])
        .args(["--pgdata", data])
        .run()?;
    let hba = folder.join("pg_hba.conf");
    fs::write(&hba, "host all all all scram-sha-256\n")?;
    let command = as_user(&["postgres", "-D", data, "-k", data, "-h", "*"])
        .args(["-c", "fsync=off", "-c", "shared_buffers=16MB"])
        .args(["-c", "dynamic_shared_memory_type=mmap"]);
    server.spawn("postgresql", command)
}

/// Runs a query as a remote user would.
pub(crate) fn query(laptop: &Host, server: std::net::IpAddr, sql: &str) -> anyhow::Result<String> {
    let url = match server {
        std::net::IpAddr::V4(v4) => format!("postgresql://demo@{v4}/postgres"),
        std::net::IpAddr::V6(v6) => format!("postgresql://demo@[{v6}]/postgres"),
    };
    let command = laptop.command(["psql", "--no-psqlrc", "-At", &url, "-c", sql]);
    command.env("PGPASSWORD", PASSWORD).run()
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

/// A user's id and group, from the system's list.
fn user(name: &str) -> anyhow::Result<(u32, u32)> {
    let list = fs::read_to_string("/etc/passwd")?;
    let fields = list
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields[0] == name)
        .with_context(|| format!("no user {name}"))?;
    match fields[..] {
        [_, _, uid, gid, ..] => Ok((uid.parse()?, gid.parse()?)),
        _ => anyhow::bail!("/etc/passwd: a short line for {name}"),
    }
}
